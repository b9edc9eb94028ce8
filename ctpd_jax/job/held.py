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
from ctpd_jax.sharding import all_processes

HOST = "pinned_host"  # JAX's name of the memory that devices copy from


class Held:
    """Trees of parameters by name; of a name the newest.

    What lies on several processes all of them keep, or none, and all of them get: whoever asks says so by `together`.
    """

    def __init__(self, share: float = 0.5) -> None:
        """`share`: what all of them may take, against what the host then still has free."""
        self._share = share
        self._trees: dict[str, Params] = {}  # the one that was asked for last comes last

    def keep(self, name: str, params: Params, together: bool = False) -> None:
        """Copy a tree, if there is room for it."""
        self._trees.pop(name, None)
        size = _bytes_here(params)
        # 1. Older ones make room.
        while self._trees and not self._room(size):
            del self._trees[next(iter(self._trees))]
        room = self._room(size)
        if not (all_processes(room) if together else room):
            return
        # 2. Each part goes to the host of its device. Nobody needs the copy: one that fails is none.
        places = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(HOST), params)
        with suppress(jax.errors.JaxRuntimeError):
            self._trees[name] = jax.block_until_ready(jax.device_put(params, places))

    def get(self, name: str, wanted: Params, together: bool = False) -> Params | None:
        """Return a tree as `wanted` says, jax.ShapeDtypeStruct with shardings, or None where it is not there so.

        float32 is rounded where bfloat16 is wanted, on the devices, one leaf after the other.
        """
        tree = self._trees.get(name)
        fits = tree is not None and _fits(tree, wanted)
        if not (all_processes(fits) if together else fits):
            return None
        tree = self._trees[name] = self._trees.pop(name)
        return jax.tree.map(_placed, tree, wanted)

    def clear(self) -> None:
        """Let go of all of them."""
        self._trees.clear()

    def _room(self, size: int) -> bool:
        # What is kept already is not free any more; the new one still is.
        return size + sum(map(_bytes_here, self._trees.values())) <= self._share * (free_memory() - size)


def _fits(tree: Params, wanted: Params) -> bool:
    def leaf_fits(leaf: jax.Array, asked: jax.ShapeDtypeStruct) -> bool:
        where = leaf.sharding.with_memory_kind("device").is_equivalent_to(asked.sharding, leaf.ndim)
        rounded = (leaf.dtype, asked.dtype) == (jnp.float32, jnp.bfloat16)
        return leaf.shape == asked.shape and where and (leaf.dtype == asked.dtype or rounded)

    there, asked = jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(wanted)
    if [path for path, _ in there] != [path for path, _ in asked]:
        return False
    return all(leaf_fits(leaf, other) for (_, leaf), (_, other) in zip(there, asked, strict=True))


def _placed(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    # Waited for: else several wide copies would lie on a device at once.
    return jax.block_until_ready(jax.device_put(leaf, wanted.sharding).astype(wanted.dtype))


def _bytes_here(params: Params) -> int:
    """Return what a tree takes on this host, every copy counted."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)


def free_memory() -> int:
    """Return how many bytes this host, or the group that this process is in, can still give; 0 where none says."""
    try:
        # 1. The host: Linux counts what its caches would give back.
        host = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(host[1]) * 1024 if host else 0
        # 2. The limits of its group and of those around it, as containers and batch systems set them.
        own = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    top = Path("/sys/fs/cgroup")
    group = top / own[1] if own else top
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # a group without one, or "max"
            cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            used = int((folder / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
            free = min(free, int((folder / "memory.max").read_text()) - used)
    return max(free, 0)
