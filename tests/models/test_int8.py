"""Matrices as int8 with a scale for every output: rounding, import, and the model that they are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny import FAMILIES, random_model
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ctpd_jax.errors import UserError
from ctpd_jax.models.decoder import apply, leaves, param_shapes
from ctpd_jax.models.hf import load_hf, save_hf
from ctpd_jax.models.hf.load import held_as, rounded
from ctpd_jax.models.lora import init_adapters, join, with_lora
from ctpd_jax.models.sampling import generate


@given(arrays(np.float32, (2, 3, 5), elements=st.floats(-(2.0**40), 2.0**40, width=32)))
def test_no_entry_is_off_by_more_than_half_a_scale(weight):
    whole, scale = rounded(weight)
    assert whole.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (2, 3)
    exact, steps = weight.astype(np.float64), whole.astype(np.float64) * scale[..., None]
    tiny = np.abs(exact).max(axis=-1, keepdims=True) < 1e-36  # where float32 itself has no digits left
    assert (np.where(tiny, 0, np.abs(exact - steps)) <= 0.5001 * scale[..., None]).all()
    largest = np.abs(whole).max(axis=-1)
    assert ((largest == 127) | (scale < 1e-36)).all()


def test_rows_of_hardly_anything_are_zeros():
    """A scale of a few of the least floats is off by half of itself: 190 of them would be 190 scales, no int8."""
    least = np.float32(2.0**-149)
    for row in (np.zeros(3, np.float32), np.array([190, -190, 3], np.float32) * least):
        whole, scale = rounded(row[None])
        assert not whole.any() and not scale.any()


def dequantized(params):
    """The same parameters, float32, each matrix its int8 times its scales."""
    if "scale" in params:
        rest = {name: value for name, value in params.items() if name not in ("weight", "scale")}
        return rest | {"weight": params["weight"].astype(jnp.float32) * params["scale"][..., None]}
    return {n: dequantized(v) if isinstance(v, dict) else jnp.asarray(v, jnp.float32) for n, v in params.items()}


def computing_in_float32(held):
    """The same parameters; without being told, a model computes in the dtype of its last norm."""
    norm = {name: leaf.astype(jnp.float32) for name, leaf in held["model"]["norm"].items()}
    return held | {"model": held["model"] | {"norm": norm}}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_int8_model_is_that_of_its_rounded_matrices(tmp_path, name):
    config, params = random_model(name)
    save_hf(tmp_path / "model", config, params)
    own, held = load_hf(tmp_path / "model", dtype="int8")
    assert own == held_as(config, "int8") != config
    # The tree that the shapes promise, everything but matrices and scales being bfloat16.
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), held) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), param_shapes(own, jnp.bfloat16)
    )
    kinds = {path[-1]: str(leaf.dtype) for path, leaf in leaves(held["model"]["layers"]) if "norm" not in path[-2]}
    assert kinds["scale"] == "float32" and "int8" in {str(leaf.dtype) for _, leaf in leaves(held)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 40)))
    found, expected = apply(own, computing_in_float32(held), tokens), apply(config, dequantized(held), tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # And not far from the model itself, on average: a router may choose another expert.
    exact = apply(config, params, tokens)
    assert float(jnp.abs(found - exact).mean()) < 0.1 * float(jnp.abs(exact).mean())


def test_an_int8_model_is_not_exported(tmp_path):
    config, params = random_model("llama")
    with pytest.raises(UserError, match=r"'int8' is not supported; use one of float32, bfloat16, float16\.$"):
        save_hf(tmp_path / "other", config, params, dtype="int8")
    save_hf(tmp_path / "model", config, params)
    with pytest.raises(UserError, match="rounded to int8 has no checkpoint"):
        save_hf(tmp_path / "other", *load_hf(tmp_path / "model", dtype="int8"))
    assert not (tmp_path / "other").exists()


def test_adapters_over_int8_train_and_answer(tmp_path):
    config, params = random_model("llama")
    save_hf(tmp_path / "model", config, params)
    own, held = load_hf(tmp_path / "model", dtype="int8")
    held = computing_in_float32(held)
    adapted = with_lora(own, 4, 8.0, "all")
    adapters = jax.tree.map(lambda leaf: leaf + 0.05, init_adapters(adapted, jax.random.key(0)))
    tokens = jnp.arange(24).reshape(2, 12)

    def loss(adapters, base, config):
        return -jax.nn.log_softmax(apply(config, join(base, adapters), tokens).astype(jnp.float32))[..., 3].sum()

    over_int8 = jax.jit(jax.grad(loss), static_argnums=2)(adapters, held, adapted)
    over_wide = jax.jit(jax.grad(loss), static_argnums=2)(adapters, dequantized(held), replace(adapted, int8=False))
    for one, other in zip(jax.tree.leaves(over_int8), jax.tree.leaves(over_wide)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))
    (answer,) = generate(adapted, join(held, adapters), [[3, 4, 5]], 4, compute_dtype="float32")
    (expected,) = generate(replace(adapted, int8=False), join(dequantized(held), adapters), [[3, 4, 5]], 4)
    assert answer == expected
