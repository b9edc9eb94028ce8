"""Weight-only int8: the layers' matrices with one float32 scale for each row, for models that only score.

    w[o, i] ~ q[o, i] s[o],  s[o] = max_i |w[o, i]| / 127,  q = round(w / s)

A row is an output of the matrix, so that the scale multiplies the product and the matrix itself is never widened in
memory. Embedding, unembedding, norms and biases stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params


def quantize(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """The same model with int8 matrices, of float32 or bfloat16 ones.

    `params` is used up: each of its matrices is deleted as soon as it is replaced, so that only one lives twice.
    """
    layers = _quantize_below(params["model"]["layers"])
    return replace(config, int8=True), params | {"model": params["model"] | {"layers": layers}}


def _quantize_below(tree: Params) -> Params:
    out: Params = {}
    for name, value in tree.items():
        # A router decides by small differences, and is small.
        keep = "norm" in name or name == "gate" or not isinstance(value, dict)
        out[name] = value if keep else _one(value) if "weight" in value else _quantize_below(value)
    return out


def _one(linear: Params) -> Params:
    values, scale = jax.block_until_ready(_rows(linear["weight"]))
    linear["weight"].delete()
    return linear | {"weight": values, "scale": scale}


@jax.jit
def _rows(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., out, in] and float32 [..., out] of a matrix [..., out, in]."""
    wide = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    safe = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(wide / safe[..., None]).astype(jnp.int8), scale
