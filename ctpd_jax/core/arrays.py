"""What all of core shares: sums run in float32 or wider, and masked entries cannot matter, not even as NaN.

Shapes in signatures are jaxtyping's, letters as in each file's header. `*batch` stands for any leading axes, `#` marks
an axis that broadcasts, and the tests check every call against them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real, Shaped

Number = int | float  # the tests' type checker takes no int for a float
Scalar = int | float | Array
SumAndCount = tuple[Float[Array, ""], Float[Array, ""]]  # how a mean travels: add both parts over hosts, divide once


def at_least_float32(values: Shaped[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Convert to float32; float64 stays, because the tests compare formulas in it."""
    array = jnp.asarray(values)
    return array.astype(jnp.promote_types(jnp.float32, array.dtype))


def mask_or_all(mask: Shaped[ArrayLike, "*#shape"] | None, shape: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """Broadcast a mask of bool or 0/1 to a shape; without a mask everything is real."""
    return jnp.ones(shape, bool) if mask is None else jnp.broadcast_to(jnp.asarray(mask, bool), shape)


def masked_sum_and_count(values: Shaped[ArrayLike, "*shape"], mask: Bool[Array, "*shape"]) -> SumAndCount:
    """Sum the values where the mask is True, and count those places."""
    kept = jnp.where(mask, at_least_float32(values), 0)
    return kept.sum(), mask.sum(dtype=kept.dtype)


def weighted(values: Real[ArrayLike, "*#shape"], weights: Real[ArrayLike, "*#shape"]) -> Float[Array, "*shape"]:
    """Multiply values by weights; where a weight is 0 the product is 0, whatever the value."""
    # The value is replaced before the product: 0 * inf is NaN, and so would be the gradient of a later `where`.
    w = at_least_float32(weights)
    return w * jnp.where(w != 0, at_least_float32(values), 0)
