"""The rules that say where parameters lie: complete, and strict."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ctpd_jax import sharding
from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.models.hf.families import FAMILIES
from ctpd_jax.models.lora import with_lora
from ctpd_jax.sharding import (
    _pieces,
    check_heads,
    make_mesh,
    param_sharding,
    param_spec,
    patiently,
    pieces_on_host,
    replicated,
    shard_shapes,
    spread,
    told_by_first,
)  # fmt: skip

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def decoder(family: str) -> DecoderConfig:
    known = {name: value for name, value in SIZES.items() if name != "moe_intermediate_size" or family == "qwen3_moe"}
    return from_hf({"model_type": family, **known})


def one_device():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_parameter_of_every_family_has_a_rule(family):
    config = decoder(family)
    trees = [param_shapes(config)]
    if FAMILIES[family].trainable:
        trees.append(param_shapes(with_lora(config, 4, 8.0)))
    for tree in trees:
        placed = shard_shapes(one_device(), tree)
        for (path, leaf), whole in zip(jax.tree.leaves_with_path(placed), jax.tree.leaves(tree)):
            assert leaf.shape == whole.shape and leaf.sharding.mesh.size == 1
            if leaf.ndim >= 3 and "lora" not in path[-1].key:  # no large matrix is whole everywhere
                assert any(axis is not None for axis in leaf.sharding.spec), path


def test_a_matrix_and_its_transpose_in_spirit():
    inner = ("model", "layers", "self_attn")
    assert param_spec((*inner, "q_proj", "weight"), (2, 32, 16)) == P(None, "tensor", "fsdp")
    assert param_spec((*inner, "o_proj", "weight"), (2, 16, 32)) == P(None, "fsdp", "tensor")
    assert param_spec((*inner, "q_norm", "weight"), (2, 8)) == P(None, None)
    experts = ("model", "layers", "mlp", "experts", "up_proj", "weight")
    assert param_spec(experts, (2, 8, 48, 32)) == P(None, None, "tensor", "fsdp")


def test_a_name_without_a_rule_is_refused():
    with pytest.raises(UserError, match=r"No rule .* model\.layers\.self_attn\.rel_pos\.weight"):
        param_spec(("model", "layers", "self_attn", "rel_pos", "weight"), (2, 4, 4))


def test_a_size_that_does_not_divide_is_refused():
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 5, "tensor": 1})
    with pytest.raises(UserError, match=r"embed_tokens.* does not divide: 32 over the 5 devices of the axis 'fsdp'"):
        param_sharding(mesh)(("model", "embed_tokens", "weight"), (96, 32))
    with pytest.raises(UserError, match=r"4 heads and 2 key-value heads.*tensor axis \(4\)"):
        check_heads(SimpleNamespace(shape={"tensor": 4}), 4, 2, "The student")


@pytest.mark.parametrize("sizes", [(2, 1, 1), (-1, -1, 1), (0, 1, 1), (1, -2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), jax.devices()[:1])


@pytest.mark.parametrize("shape", [(7, 3, 5), (12,), (1, 4), ()])
def test_an_array_of_several_processes_comes_in_pieces_that_are_its_bytes(shape):
    whole = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    placed = jax.device_put(jnp.asarray(whole), replicated(one_device()))
    pieces = list(_pieces(placed, most=4 * 3 * 5 * 2))  # two rows of the first
    assert b"".join(piece.tobytes() for piece in pieces) == whole.tobytes()
    assert len(pieces) == {3: 4, 1: 1, 2: 1, 0: 1}[whole.ndim]
    assert [piece.tolist() for piece in pieces_on_host(placed)] == [whole.tolist()]


def test_what_is_missing_is_what_the_first_process_says(monkeypatch):
    """Two processes whose views of a shared folder differ; the broadcast itself is for the tests with two."""
    sent: list = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def broadcast(value):
        if sharding.first_process():
            sent.append(value)
            return value
        return sent.pop(0)

    monkeypatch.setattr(sharding.multihost_utils, "broadcast_one_to_all", broadcast)

    def refuse():
        raise UserError("inputs.json was made otherwise")

    def fail():
        raise OSError(28, "No space left on device: made otherwise", "inputs.json")

    looks = ((lambda: [256, [0, 3]], [256, [0, 3]]), (lambda: None, None), (refuse, UserError), (fail, UserError))
    for look, found in looks:
        for number in (0, 1):
            monkeypatch.setattr(jax, "process_index", lambda number=number: number)
            mine = look if number == 0 else lambda: "not what I see"
            if found is UserError:
                with pytest.raises(UserError, match="made otherwise"):
                    told_by_first(mine)
            else:
                assert told_by_first(mine) == found


def test_a_file_that_another_process_wrote_may_come_late(monkeypatch):
    views = iter([None, None, "there"])
    assert patiently(lambda: next(views), seconds=1.0) is None  # alone there is nobody to wait for
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert patiently(lambda: next(views), seconds=1.0) == "there"
    assert patiently(lambda: None, seconds=0.2) is None


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((5, 8, 16), P(None, "fsdp"), P(None, ("fsdp", "data"), None)),  # 5 does not divide by 2, 8 / 4 does
        ((6, 8, 16), P(None, "tensor", "fsdp"), P("data", "tensor", "fsdp")),
        ((3, 8), P(), P(None, ("data", "fsdp", "tensor"))),
        ((3, 5), P(), P()),  # nothing divides: each reads all of it
        ((), P(), P()),
        ((8, 16), P("fsdp", ("data", "tensor")), P("fsdp", ("data", "tensor"))),  # no copies
    ],
)
def test_copies_of_a_part_read_a_piece_of_it_each(shape, spec, expected):
    mesh = AbstractMesh((2, 4, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    found = spread(NamedSharding(mesh, spec), shape)
    assert found.is_equivalent_to(NamedSharding(mesh, expected), len(shape)), found.spec
