"""Adapters: joined, merged, trained alone, and as PEFT writes them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.peft_folder import load_peft
from helpers.tiny import CONFIGS, random_model

from ctpd_jax.errors import UserError
from ctpd_jax.models.decoder import apply, hidden_states, param_shapes
from ctpd_jax.models.hf import safetensors
from ctpd_jax.models.lora import (
    adapter_shapes,
    init_adapters,
    join,
    linear_names,
    merge,
    save_peft,
    split,
    with_lora,
)  # fmt: skip

TOKENS = np.arange(24).reshape(2, 12) % 80


def adapted(name: str, targets: str = "all"):
    """(plain config, config with adapters, base, random adapters)."""
    plain, base = random_model(name)
    config = with_lora(plain, rank=3, alpha=5.0, targets=targets)
    random = np.random.default_rng(3)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape, scale=0.2), jnp.float32), adapter_shapes(config)
    )
    return plain, config, base, adapters


@pytest.mark.parametrize("name", ["gemma3", "phi3_longrope", "gpt_neox"])
def test_merged_equals_joined(name):
    plain, config, base, adapters = adapted(name)
    before = apply(plain, base, TOKENS)
    joined = apply(config, join(base, adapters), TOKENS)
    merged = apply(plain, merge(config, jax.tree.map(jnp.array, base), adapters), TOKENS)
    np.testing.assert_allclose(merged, joined, atol=1e-4)
    assert np.abs(joined - before).max() > 0.1


def test_fresh_adapters_change_nothing():
    plain, config, base, _ = adapted("gemma3")
    fresh = init_adapters(config, jax.random.key(0))
    np.testing.assert_array_equal(apply(config, join(base, fresh), TOKENS), apply(plain, base, TOKENS))
    scale = {path[-1].key: float(jnp.abs(leaf).max()) for path, leaf in jax.tree.leaves_with_path(fresh)}
    assert scale["lora_b"] == 0 and 0.5 * config.hidden_size**-0.5 < scale["lora_a"] <= config.hidden_size**-0.5


def test_split_undoes_join_and_shapes_are_those_of_the_config():
    _, config, base, adapters = adapted("llama_biases")
    joined = join(base, adapters)
    assert jax.tree.map(jnp.shape, joined) == jax.tree.map(lambda leaf: leaf.shape, param_shapes(config))
    again, rest = split(joined)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert jax.tree.structure(rest) == jax.tree.structure(base)


def test_targets():
    plain, config, _, adapters = adapted("llama", "q_proj, down_proj")
    assert linear_names(plain) == ("down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj")
    assert sorted({path[-2].key for path, _ in jax.tree.leaves_with_path(adapters)}) == ["down_proj", "q_proj"]
    assert config.lora.scale == 5.0 / 3
    with pytest.raises(UserError, match=r"query_key_value: this model has .*q_proj"):
        with_lora(plain, 2, 1.0, "q_proj,query_key_value")


def test_gradient_of_adapters_is_that_of_the_merged_matrices():
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, whatever the model does with W."""
    plain, config, base, adapters = adapted("llama")

    def loss(model, params):
        return jnp.sum(jnp.sin(hidden_states(model, params, TOKENS)))

    found = jax.grad(lambda part: loss(config, join(base, part)))(adapters)
    whole = jax.grad(partial(loss, plain))(merge(config, jax.tree.map(jnp.array, base), adapters))
    for module in ("q_proj", "o_proj"):
        gradient = whole["model"]["layers"]["self_attn"][module]["weight"]
        pair, got = (tree["model"]["layers"]["self_attn"][module] for tree in (adapters, found))
        a = config.lora.scale * np.einsum("lor,loi->lri", pair["lora_b"], gradient)
        b = config.lora.scale * np.einsum("loi,lri->lor", gradient, pair["lora_a"])
        np.testing.assert_allclose(got["lora_a"], a, rtol=1e-3, atol=1e-3 * np.abs(a).max())
        np.testing.assert_allclose(got["lora_b"], b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_peft_folder_round_trip(tmp_path):
    plain, config, _, adapters = adapted("gemma3", "q_proj,up_proj")
    save_peft(tmp_path / "adapters", config, adapters, "some/model")
    names = safetensors.read_header(tmp_path / "adapters" / "adapter_model.safetensors")
    assert names["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (3, plain.hidden_size)
    save_peft(tmp_path / "adapters", config, adapters, "some/model")  # again: replaced
    again, loaded = load_peft(tmp_path / "adapters", plain)
    assert set(again.lora.targets) == set(config.lora.targets) and again.lora.scale == config.lora.scale
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_peft_folder_refusals(tmp_path):
    plain, config, _, adapters = adapted("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="not a folder of adapters"):
        save_peft(tmp_path / "full", config, adapters, "m")
    with pytest.raises(UserError, match="no LoRA adapters"):
        load_peft(tmp_path / "full", plain)
    save_peft(tmp_path / "other", config, adapters, "m")
    with pytest.raises(UserError, match=r"missing or has another shape|this model has"):
        load_peft(tmp_path / "other", CONFIGS["gemma3"])
