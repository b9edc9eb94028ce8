"""The two conventions that all of core shares: sums are at least float32, and what is masked does not matter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Scalar = float | jax.Array


def at_least_float32(values: ArrayLike) -> jax.Array:
    """The values as an array of float32, or of their own type where that is wider."""
    array = jnp.asarray(values)
    return array.astype(jnp.promote_types(jnp.float32, array.dtype))


def mask_or_all(mask: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array:
    """The mask as bool of this shape; all True without one."""
    return jnp.ones(shape, bool) if mask is None else jnp.broadcast_to(jnp.asarray(mask, bool), shape)


def masked_sum_and_count(values: ArrayLike, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the values where the mask is True, and how many those are: how numbers travel until they are divided."""
    kept = jnp.where(mask, at_least_float32(values), 0)
    return kept.sum(), mask.sum(dtype=kept.dtype)


def weighted_sum(values: ArrayLike, weights: ArrayLike) -> jax.Array:
    """sum w * v over the last axis, with v replaced where w = 0 so that neither 0 * inf nor its gradient gives NaN."""
    w = at_least_float32(weights)
    return jnp.sum(w * jnp.where(w != 0, at_least_float32(values), 0), axis=-1)
