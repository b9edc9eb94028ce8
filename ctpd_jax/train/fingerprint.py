"""A number that tells whether an array is the one that was saved, computed where the array lies.

A checksum of a checkpoint's files reads all of them once more. This one is taken of the values, on the devices, before
they are written and after they are read, and is the same however the array is cut:

    sum over i of mix(bits(x_i) xor w(i))  mod 2^32,  twice, with other numbers w(i) that look random

`mix` gives different integers for different bits, so one wrong element shows for certain. What more of them add up to
looks random too: they escape both sums about once in 2^64.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.schema import Array

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_NAN = 0x7FC0  # of bfloat16


def fingerprints(leaves: Mapping[str, Any], rounded: bool = False) -> dict[str, str]:
    """Return of every leaf its two sums, as 16 hexadecimal digits.

    Args:
        leaves: jax arrays of real numbers in at most four bytes, or NumPy arrays of at most eight. Of arrays of several
            processes every process asks.
        rounded: those of float32 leaves as bfloat16 holds them, and of bfloat16 ones; every NaN is the same. Others
            have none.
    """
    found = {}
    for name, leaf in leaves.items():
        if not rounded or leaf.dtype in (jnp.float32, jnp.bfloat16):
            # Waited for, one after the other: on CPUs two sums over processes at once may block each other for ever.
            found[name] = "".join(f"{int(part):08x}" for part in np.asarray(_sums(_words(leaf), rounded)))
    return found


def _words(leaf: Any) -> Any:
    """Return a jax array as it is, and NumPy's as unsigned integers of at most 32 bits: of 64 they are two."""
    if isinstance(leaf, jax.Array):
        return leaf
    leaf = np.ascontiguousarray(leaf)
    if leaf.dtype == jnp.bfloat16:  # which JAX holds, too
        return leaf
    return leaf.reshape(*leaf.shape, 1).view(np.uint32 if leaf.itemsize == 8 else f"uint{8 * leaf.itemsize}")


@partial(jax.jit, static_argnums=1)
def _sums(x: Array, rounded: bool) -> Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    # 1. The elements as integers, of which a scalar is one.
    x = x if x.ndim else x[None]
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    if rounded:
        bits = _to_bfloat16(bits) if x.dtype == jnp.float32 else jnp.where(bits & 0x7FFF > 0x7F80, _NAN, bits)
    # 2. The place of each, whatever part of the array a device holds. The layers of a large model hold more than 2^32
    # elements: they are not just counted on.
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place += index * np.uint32(stride % 2**32) if axis else _mixed(index + np.uint32(0x27D4EB2F))
        stride *= x.shape[axis]
    # 3. Its two numbers.
    first = _mixed(place + np.uint32(0x9E3779B9))
    second = _mixed(first + np.uint32(0x85EBCA77))
    # 4. Both sums in one reduction, which XLA makes ten times faster on a CPU than two.
    terms, none = (_mixed(bits ^ first), _mixed(bits ^ second)), np.uint32(0)
    both = jax.lax.reduce(terms, (none, none), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim)))
    return jnp.stack(both)


def _mixed(x: Array) -> Array:
    """Return uint32 integers that look random, different for different `x` (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _to_bfloat16(bits: Array) -> Array:
    """Return the bits of the nearest bfloat16, ties to even: by integers, which nothing flushes or reorders."""
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return jnp.where(bits & 0x7FFFFFFF > 0x7F800000, _NAN, nearest)
