"""A number that tells whether an array is the one that was saved, computed where the array lies.

A checksum of a checkpoint's files reads all of them once more. This one is taken of the values, on the devices, before
they are written and after they are read, and is the same however the array is cut:

    sum over i of w(i) * bits(x_i)  mod 2^32,  twice, with weights w(i) that are odd and look random

An odd weight makes one wrong element show for certain; two wrong ones escape both sums about once in 2^64.
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


def fingerprints(leaves: Mapping[str, Any], rounded: bool = False) -> dict[str, str]:
    """Return of every leaf its two sums, as 16 hexadecimal digits.

    Args:
        leaves: jax or NumPy arrays of any dtype. Of arrays of several processes every process asks.
        rounded: those of float32 leaves as bfloat16 holds them, and of no other ones.
    """
    found = {}
    for name, leaf in leaves.items():
        if not rounded or leaf.dtype == np.float32:
            # Waited for, one after the other: on CPUs two sums over processes at once may block each other for ever.
            found[name] = "".join(f"{int(part):08x}" for part in np.asarray(_sums(_words(leaf), rounded)))
    return found


def _words(leaf: Any) -> Any:
    """Return an array's bits as unsigned integers of at most 32 bits; of NumPy's 64 they are two."""
    if isinstance(leaf, jax.Array):
        return leaf
    leaf = np.ascontiguousarray(leaf)
    return leaf.reshape(*leaf.shape, 1).view(np.uint32 if leaf.itemsize == 8 else f"uint{8 * leaf.itemsize}")


@partial(jax.jit, static_argnums=1)
def _sums(x: Array, rounded: bool) -> Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    # 1. The elements as integers.
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    if rounded:
        bits = _to_bfloat16(bits)
    # 2. The place of each, whatever part of the array a device holds.
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    # 3. Its two weights.
    first = _mixed(place + np.uint32(0x9E3779B9))
    second = _mixed(first + np.uint32(0x85EBCA77))
    # 4. Both sums in one reduction, which XLA makes ten times faster on a CPU than two.
    terms, none = (bits * (first | 1), bits * (second | 1)), np.uint32(0)
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
    not_a_number = (bits & 0x7FFFFFFF) > 0x7F800000
    return jnp.where(not_a_number, (bits >> 16) & 0x8000 | 0x7FC0, nearest)
