"""Weight-only int8 against its definition, and against the model that it rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model

from ctpd_jax.models.decoder import apply, param_shapes
from ctpd_jax.models.int8 import quantize

TOKENS = np.arange(24).reshape(2, 12) % 80


def widened(tree):
    """The parameters that an int8 model stands for, as a plain model's."""
    if "scale" in tree:
        rest = {name: leaf for name, leaf in tree.items() if name != "scale"}
        return rest | {"weight": tree["weight"].astype(jnp.float32) * tree["scale"][..., None]}
    return {name: widened(value) if isinstance(value, dict) else value for name, value in tree.items()}


@pytest.mark.parametrize("name", ["gemma3", "phi3_longrope", "mixtral"])
def test_an_int8_model_is_the_model_of_its_rounded_matrices(name):
    config, params = random_model(name)
    exact = jax.tree.map(np.asarray, params)
    rounded_config, rounded = quantize(config, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), rounded) == jax.tree.map(
        lambda x: (x.shape, x.dtype), param_shapes(rounded_config)
    )
    plain = widened(rounded)
    np.testing.assert_allclose(apply(rounded_config, rounded, TOKENS), apply(config, plain, TOKENS), atol=2e-4)
    for (path, before), after in zip(jax.tree.leaves_with_path(exact), jax.tree.leaves(plain)):
        # Half a step of the row's own scale, and nothing at all where nothing is rounded.
        step = np.abs(before).max(axis=-1, keepdims=True) / 127
        bound = 0.501 * step if path[-2].key.endswith("proj") and path[-1].key == "weight" else 0
        assert (np.abs(before - np.asarray(after)) <= bound).all(), path


def test_a_row_of_zeros_stays_zero():
    config, params = random_model("llama")
    weight = params["model"]["layers"]["mlp"]["up_proj"]["weight"]
    params["model"]["layers"]["mlp"]["up_proj"]["weight"] = weight.at[:, 3].set(0)
    rounded_config, rounded = quantize(config, params)
    assert np.isfinite(apply(rounded_config, rounded, TOKENS)).all()
    assert not np.asarray(rounded["model"]["layers"]["mlp"]["up_proj"]["weight"][:, 3]).any()


def test_matrices_are_given_up():
    config, params = random_model("llama")
    weight, norm = params["model"]["layers"]["mlp"]["up_proj"]["weight"], params["model"]["norm"]["weight"]
    quantize(config, params)
    assert weight.is_deleted() and not norm.is_deleted()
