"""Parameters that a command has read or trained, kept for its later stages in the memory of the hosts.

They are copies: what trains may donate the arrays that it is given. Those that were asked for longest ago go first
where memory is short; what is not there any more is read from disk.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp

from ctpd_jax.models.decoder import Params

HOST = "pinned_host"  # JAX's name of the memory that devices copy from


class Held:
    """Trees of parameters by name; of a name the newest."""

    def __init__(self, share: float = 0.5) -> None:
        """`share`: of the host's free memory that all of them may take."""
        self._share = share
        self._trees: dict[str, Params] = {}  # the one that was asked for last comes last

    def keep(self, name: str, params: Params) -> None:
        """Copy a tree, if there is room for it."""
        self._trees.pop(name, None)
        size = _bytes_here(params)
        # 1. Older ones make room. What is kept already is not free any more, so that both sides count it.
        while self._trees and size + self._size() > self._share * (free_memory() - size):
            del self._trees[next(iter(self._trees))]
        if size > self._share * (free_memory() - size):
            return
        # 2. Each part goes to the host of its device.
        places = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(HOST), params)
        self._trees[name] = jax.block_until_ready(jax.device_put(params, places))

    def get(self, name: str, wanted: Params) -> Params | None:
        """Return a tree as `wanted` says, jax.ShapeDtypeStruct with shardings, or None where it is not there so.

        float32 is rounded where bfloat16 is wanted, on the devices, one leaf after the other.
        """
        tree = self._trees.get(name)
        if tree is None or not jax.tree.all(jax.tree.map(_fits, tree, wanted)):
            return None
        self._trees[name] = self._trees.pop(name)
        return jax.tree.map(_placed, tree, wanted)

    def _size(self) -> int:
        return sum(map(_bytes_here, self._trees.values()))


def _fits(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> bool:
    where = leaf.sharding.with_memory_kind("device").is_equivalent_to(wanted.sharding, leaf.ndim)
    rounded = (leaf.dtype, wanted.dtype) == (jnp.float32, jnp.bfloat16)
    return leaf.shape == wanted.shape and where and (leaf.dtype == wanted.dtype or rounded)


def _placed(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    # Waited for: else several wide copies would lie on a device at once.
    return jax.block_until_ready(jax.device_put(leaf, wanted.sharding).astype(wanted.dtype))


def _bytes_here(params: Params) -> int:
    """Return what a tree takes on this host, every copy counted."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)


def free_memory() -> int:
    """Return how many bytes this host, or the container that it is, can still give; 0 where it does not say."""
    # 1. The host: Linux counts what its caches would give back.
    with suppress(OSError):
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) * 1024 if found else 0
        # 2. A container's limit, which the host's numbers do not show.
        with suppress(OSError, ValueError):  # none, or "max"
            group = Path("/sys/fs/cgroup")
            free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
        return max(free, 0)
    return 0
