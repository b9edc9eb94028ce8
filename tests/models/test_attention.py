"""Every attention back end against the plain one, and what each of them refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HELPERS, real_assets
from helpers.tiny import CONFIGS, random_model

from ctpd_jax.errors import UserError
from ctpd_jax.job import check
from ctpd_jax.models import attention, attention_backends
from ctpd_jax.models.attention_backends import REFUSED, Backend, check_backend, choose_backend
from ctpd_jax.models.config import DecoderConfig, LayerKind
from ctpd_jax.models.decoder import hidden_states
from ctpd_jax.schema import RowLayout

WINDOW = 9  # shorter than the segments below


def decoder(head_dim=64, softcap=None, heads=4, kv_heads=2, windows=(None, WINDOW)) -> DecoderConfig:
    return replace(
        CONFIGS["llama"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        attention_softcap=softcap,
        attention_scale=0.2,
        kinds=tuple(LayerKind(window=window) for window in windows),
        layer_kinds=(0, len(windows) - 1, 0),
    )


def two_rows(length: int, packed: bool = True, shared: bool = False) -> RowLayout:
    """Two rows, one half padding: of one segment, of three, or of a prompt and two responses that share it."""
    positions, segment, parent = np.zeros((3, 2, length), np.int32)
    for row, used in enumerate((length - 7, length // 2)):
        cuts = [0, used // 3, used // 3 + used // 2, used] if packed else [0, used]
        for number, (start, stop) in enumerate(pairwise(cuts), 1):
            prompt = cuts[1] if shared and number > 1 else 0
            positions[row, start:stop] = np.arange(prompt, prompt + stop - start)
            segment[row, start:stop] = number
            parent[row, start:stop] = 1 if shared else number
    return RowLayout(*map(jnp.asarray, (positions, segment, parent)))


def heads_of(config: DecoderConfig, length: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values, and what the attention's output is multiplied with for a gradient."""
    random = np.random.default_rng(0)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    return tuple(jnp.asarray(random.normal(size=(2, length, h, config.head_dim)), jnp.float32) for h in heads)


# These programs run once: a fast compilation is worth more than a fast program.
once = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(once, static_argnums=(0, 1, 2))
def attended(backend, config, dtype, row, heads, kind):
    """The attention's output at every real token, and the gradients of a weighted sum of it."""
    attend = attention_backends.make_attend(backend, config, row)
    real = (row.segment > 0)[..., None, None]
    *qkv, weights = heads

    def loss(q, k, v):
        out = attend(q.astype(dtype), k.astype(dtype), v.astype(dtype), kind)
        assert out.shape == q.shape and out.dtype == dtype
        return jnp.sum(jnp.where(real, out, 0).astype(jnp.float32) * weights), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)
    return jnp.where(real, out, 0), gradients, jnp.isfinite(out).all()


# Each of these is one compiled program for both layouts of the rows and both kinds of layers.
CASES = {
    "head_dim 64": (decoder(64), 128),
    "head_dim 128, soft cap": (decoder(128, softcap=2.0), 128),
    "head_dim 96, one key head, rows no multiple of 128, one kind": (decoder(96, None, 3, 1, (WINDOW,)), 200),
    "head_dim 16, as many key heads, soft cap, several blocks": (decoder(16, 2.0, 2, 2), 384),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in ("splash", "splash_segments") for name in CASES]
    + [("xla", name) for name, (config, _) in CASES.items() if config.attention_softcap is None],
)
def test_values_and_gradients_are_those_of_the_plain_back_end(backend, name):
    config, length = CASES[name]
    heads = heads_of(config, length)
    outputs = []
    for packed, shared in ((False, False), (True, False), (True, True)):
        if shared and (backend, "prompt sharing") in REFUSED:
            continue
        row = two_rows(length, packed, shared)
        for kind in range(len(config.kinds)):
            expected, expected_gradients, _ = attended("plain", config, jnp.float32, row, heads, kind)
            out, gradients, finite = attended(backend, config, jnp.float32, row, heads, kind)
            assert finite  # at padding too
            np.testing.assert_allclose(out, expected, atol=1e-5)
            for got, wanted in zip(gradients, expected_gradients):
                np.testing.assert_allclose(got, wanted, atol=2e-5)
            outputs.append(np.asarray(expected))
    # The cases differ, so that none of them can pass for another.
    assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("backend", ["xla", "splash", "splash_segments"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_back_end(backend):
    config = decoder(64)
    row, heads = two_rows(128), heads_of(config, 128)

    def distance(backend, dtype):
        out, gradients, _ = attended(backend, config, dtype, row, heads, 1)
        exact, exact_gradients, _ = attended("plain", config, jnp.float32, row, heads, 1)
        pairs = zip((out, *gradients), (exact, *exact_gradients))
        return np.array([float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs])

    plain, other = distance("plain", jnp.bfloat16), distance(backend, jnp.bfloat16)
    assert (other > 0).all() and (other < 1.5 * plain).all() and (plain < 0.01).all()


@cache
def decoded(name: str, backend: str, shared: bool):
    """Sum of the squared sine of the hidden states at real tokens, these states, the gradient of the parameters."""
    config, params = random_model(name)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64)).astype(np.int32)
    return _decoded(config, backend, params, tokens, two_rows(64, shared=shared))


@partial(once, static_argnums=(0, 1))
def _decoded(config, backend, params, tokens, row):
    def loss(params):
        hidden = hidden_states(config, params, tokens, row, attention_backend=backend)
        # Squared, so that nothing cancels: a sum near zero would be compared by its rounding, which differs by machine.
        return jnp.sum(jnp.where((row.segment > 0)[..., None], jnp.sin(hidden) ** 2, 0)), hidden

    (value, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, hidden, gradient


@pytest.mark.parametrize(
    ("backend", "name", "shared"),
    [("xla", "gemma3", True), ("splash", "gemma3_softcaps", True), ("splash_segments", "gemma3_softcaps", False)],
)
def test_in_the_scanned_decoder_with_alternating_kinds(backend, name, shared):
    assert len({CONFIGS[name].kinds[kind].window for kind in CONFIGS[name].layer_kinds}) == 2
    value, hidden, gradient = decoded(name, backend, shared)
    expected, expected_hidden, expected_gradient = decoded(name, "plain", shared)
    assert np.isfinite(hidden).all()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    real = np.asarray(two_rows(64).segment) > 0
    np.testing.assert_allclose(hidden[real], expected_hidden[real], atol=1e-4)
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient)):
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("turned", [16, 8], ids=["all dimensions", "half of them"])
def test_positions_by_a_product_are_the_same_to_the_bit(dtype, turned):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 5, 3, 16)), dtype)
    angles = random.normal(size=(2, 5, turned // 2)).astype(np.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    expected, gradient_of = jax.vjp(lambda x: attention.rotate(x, cos, sin), x)
    found, found_gradient_of = jax.vjp(lambda x: attention.rotate_by_product(x, cos, sin), x)
    np.testing.assert_array_equal(found, expected)
    (expected_gradient,), (gradient,) = gradient_of(x), found_gradient_of(x)
    assert gradient.dtype == x.dtype
    np.testing.assert_allclose(
        np.float32(gradient), np.float32(expected_gradient), rtol=1e-6 if dtype == "float32" else 2**-7, atol=1e-6
    )


def test_the_library_multiplies_float32_as_float32():
    """Of which a CPU shows nothing: TPUs would take bfloat16 and GPUs TF32."""
    config, row = decoder(), two_rows(64)

    def loss(q, k, v):
        return jnp.sum(attention_backends.make_attend("xla", config, row)(q, k, v, jnp.int32(0)))

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*heads_of(config, 64)[:3]))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") >= 6


# ------------------------------------------------------------------------------------------------ cuDNN


def test_cudnn_gets_the_mask_and_the_scale(monkeypatch):
    """All that can be seen without a GPU: what is handed over, computed by XLA instead, is the plain attention."""
    calls, original = [], jax.nn.dot_product_attention

    def by_xla(*args, **kwargs):
        calls.append(kwargs["implementation"])
        return original(*args, **{**kwargs, "implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    config, length = CASES["head_dim 64"]
    row, heads = two_rows(length, shared=True), heads_of(config, length)
    for kind in (0, 1):
        out, gradients, _ = attended("cudnn", config, jnp.float32, row, heads, kind)
        expected, expected_gradients, _ = attended("plain", config, jnp.float32, row, heads, kind)
        for got, wanted in zip((out, *gradients), (expected, *expected_gradients)):
            np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert set(calls) == {"cudnn"}


def cuda_program(monkeypatch, head_dim=64, dtype=jnp.bfloat16) -> str:
    """The gradient lowered for CUDA, which needs no GPU, but for the version of a cuDNN that is not there."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    config, row = decoder(head_dim), two_rows(64, shared=True)

    def loss(q, k, v):
        return jnp.sum(attention_backends.make_attend("cudnn", config, row)(q, k, v, jnp.int32(1)).astype(jnp.float32))

    arrays = [x.astype(dtype) for x in heads_of(config, 64)[:3]]
    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_lowers_to_its_own_kernels(monkeypatch):
    called = set(re.findall(r"__cudnn\$\w+", cuda_program(monkeypatch)))
    assert called == {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}


def test_what_is_refused_of_cudnn_it_really_cannot_do(monkeypatch):
    """So that the refusals go when the library learns more."""
    for head_dim, dtype in ((64, jnp.float32), (136, jnp.bfloat16), (12, jnp.bfloat16)):
        with monkeypatch.context() as patch, pytest.raises((ValueError, NotImplementedError)) as error:
            # Past our own check, to the library's.
            patch.setattr(attention_backends, "check_backend", lambda *_: None)
            cuda_program(patch, head_dim, dtype)
        assert not isinstance(error.value, UserError)


def test_cudnn_refuses_rows_of_an_odd_length():
    with pytest.raises(UserError, match=r"even length, not 63.*rows\.multiple"):
        attention_backends.make_attend("cudnn", decoder(), two_rows(63))


# ------------------------------------------------------------------------------------------------ the matrix


def asking(feature: str) -> dict:
    """Arguments of check_backend that ask for one feature."""
    config = decoder(64, windows=(None,))
    asked = {"config": config, "dtype": None, "shared": None, "platform": None}
    match feature:
        case "soft cap":
            return {**asked, "config": replace(config, attention_softcap=2.0)}
        case "sliding window":
            return {**asked, "config": decoder(64)}
        case "head_dim over 128":
            return {**asked, "config": decoder(256, windows=(None,))}
        case "head_dim not by 8":
            return {**asked, "config": decoder(12, windows=(None,))}
        case "prompt sharing":
            return {**asked, "shared": True}
        case "packed segments":
            return {**asked, "shared": False}  # the rows of every run may hold several
        case "float32" | "bfloat16":
            return {**asked, "dtype": feature}
    return {**asked, "platform": feature}


BACKENDS = get_args(Backend)
# What a run may ask of a back end.
FEATURES = (
    "soft cap", "sliding window", "packed segments", "prompt sharing", "head_dim over 128", "head_dim not by 8",
    "float32", "bfloat16", "cpu", "gpu", "other gpu", "tpu",
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cell_of_the_matrix_is_supported_or_refused_by_name(backend):
    assert all(cell[0] in BACKENDS and cell[1] in FEATURES for cell in REFUSED)
    for feature in FEATURES:
        asked = asking(feature)
        if (backend, feature) not in REFUSED:
            check_backend(backend, **asked)
            continue
        with pytest.raises(UserError, match=r"--config\.attention=auto") as error:
            check_backend(backend, **asked)
        assert repr(backend) in str(error.value) and feature in str(error.value)
        assert REFUSED[backend, feature] in str(error.value)


def test_the_plain_back_end_refuses_nothing():
    assert not [cell for cell in REFUSED if cell[0] == "plain"]


@pytest.mark.parametrize("backend", ["xla", "cudnn"])
def test_a_soft_cap_is_never_left_out_silently(backend):
    config, params = random_model("gemma3_softcaps")
    with pytest.raises(UserError, match=f"'{backend}' cannot be used with soft cap"):
        hidden_states(config, params, np.zeros((1, 8), np.int32), attention_backend=backend)


def test_auto_takes_the_fastest_that_can():
    plain, capped, wide = decoder(64), decoder(64, softcap=2.0), decoder(256)
    for config, dtype, shared, platform, backend in (
        (plain, "float32", False, "cpu", "plain"),
        (plain, "bfloat16", True, "cpu", "plain"),
        (capped, "bfloat16", False, "tpu", "splash_segments"),
        (capped, "bfloat16", True, "tpu", "splash"),
        (plain, "float32", False, "tpu", "plain"),
        (plain, "bfloat16", True, "gpu", "cudnn"),
        (plain, "float32", False, "gpu", "plain"),
        (capped, "bfloat16", False, "gpu", "plain"),
        (wide, "bfloat16", False, "gpu", "plain"),
        (plain, "bfloat16", False, "other gpu", "plain"),
    ):
        assert choose_backend("auto", config, dtype, shared, platform) == backend
        check_backend(backend, config, dtype, shared, platform)


def test_what_is_asked_for_by_name_is_taken_or_refused():
    assert choose_backend("plain", decoder(), "bfloat16", True, "tpu") == "plain"
    assert choose_backend("xla", decoder(), "float32", True, "cpu") == "xla"
    assert choose_backend("splash", decoder(), "bfloat16", False, "tpu") == "splash_segments"
    assert choose_backend("splash", decoder(), "bfloat16", True, "tpu") == "splash"
    for choice, dtype, platform, why in (
        ("splash", "bfloat16", "cpu", "for TPUs"),
        ("splash", "float32", "tpu", "precision of bfloat16"),
        ("cudnn", "bfloat16", "cpu", "NVIDIA"),
        ("cudnn", "float32", "gpu", "bfloat16 only"),
    ):
        with pytest.raises(UserError, match=why):
            choose_backend(choice, decoder(), dtype, False, platform)
    assert check.CHOICES["attention"] == ("auto", *attention_backends.CHOICES)


def test_platforms():
    def device(platform, **more):
        return attention_backends.platform_of(SimpleNamespace(platform=platform, **more))

    assert attention_backends.platform_of(jax.devices("cpu")[0]) == "cpu" and device("tpu") == "tpu"
    assert device("gpu", compute_capability="8.0") == device("gpu", compute_capability="12.0") == "gpu"
    for old in ("7.5", "gfx90a"):  # a T4, and AMD's
        assert device("gpu", compute_capability=old) == "other gpu"
    assert device("gpu") == "other gpu"
    dtypes = [attention_backends.usual_dtype(platform) for platform in ("cpu", "tpu", "gpu", "other gpu")]
    assert dtypes == ["float32", "bfloat16", "bfloat16", "float32"]


# ------------------------------------------------------------------------------------------------ on a TPU


@pytest.mark.slow
def test_compiled_for_a_tpu_splash_holds_no_scores():
    programs = json.loads(real_assets.run_with_libtpu(HELPERS / "tpu_attention.py").splitlines()[-1])
    assert len(programs) == 6
    for name, found in programs.items():
        if name.startswith("xla"):  # so that the search is known to find scores
            assert any(square.startswith("f32") for square in found["square"]) and not found["calls"]
            continue
        assert found["kernels"] == ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"], name
        assert not found["square"], name
        # Forward, forward again in the backward pass, and the two of the gradient; segments: one set a window.
        assert found["calls"] == (8 if "segments" in name else 4), name
