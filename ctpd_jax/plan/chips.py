"""The chips that are known, and a topology's devices on a machine that has none of them."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from ctpd_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak rates a second as the maker states them, and the bytes of memory that libtpu gives to programs."""

    memory: float  # bytes; of a chip sold with 16 GB, 15.75 GiB
    flops: float  # of bfloat16 products
    bandwidth: float  # bytes to and from its memory
    links: float  # bytes over all its links to other chips


CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 448e9),
}
NETWORK = 12.5e9 / 4  # bytes a second that one of a host's four chips has of the network between slices
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
GRIDS = {"v5e": _FLAT, "v6e": _FLAT}  # of v5p there are many


@dataclass(frozen=True)
class Topology:
    """Chips of one kind in a grid: "v5e:4x4"; or in several, with a network between them: "2xv5e:4x4"."""

    name: str
    kind: str
    sizes: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        return self.slices * math.prod(self.sizes)

    @property
    def hosts(self) -> int:
        """How many hosts it has, and so processes: of 2 x 2 chips each (some v5e and v6e hosts have 2 x 4)."""
        return max(1, self.count // 4)

    @property
    def host(self) -> Topology:
        """The chips of one host."""
        sizes = (2, 2, 1)[: len(self.sizes)]
        return self if self.hosts == 1 else Topology(f"{self.kind}:{'x'.join(map(str, sizes))}", self.kind, sizes)


def parse_topology(name: str) -> Topology:
    """ "v5e:4x4" -> Topology. Raises UserError for what is none."""
    found = re.fullmatch(r"(?:([1-9]\d{0,2})x)?([a-z]\w+):(\d+(?:x\d+){1,2})", name)
    if not found or found[2] not in CHIPS:
        raise UserError(
            f"--topology {name!r}: write the kind of chip ({', '.join(CHIPS)}) and its grid, such as v5e:4x4 for 16 "
            "chips, v5p:2x2x1, or 2xv5e:16x16 for two slices."
        )
    # The grids that are sold; of others the compiler would only say that it has no such topology.
    slices, kind, grid = int(found[1] or 1), found[2], found[3]
    sizes, grids = tuple(int(size) for size in grid.split("x")), GRIDS.get(kind)
    if 0 in sizes or (grids and grid not in grids) or (not grids and len(sizes) != 3):
        known = f"slices of {kind} are {', '.join(grids)}" if grids else f"a slice of {kind} has three sides"
        raise UserError(f"--topology {name!r}: {known}, such as {kind}:{'4x4' if grids else '2x2x1'}.")
    return Topology(name, kind, sizes, slices)


def has_compiler() -> bool:
    """Whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def quiet_compiler() -> None:
    """To be called before JAX is imported: it stays on the CPU, and libtpu looks for no TPU and writes no logs."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here uses a TPU that somebody else may be using
    }.items():
        os.environ.setdefault(name, value)


def devices_of(topology: Topology) -> list[Any]:
    """The topology's devices to compile for; without the compiler as many of the CPU's, for shapes and shardings.

    To be called before JAX has devices. Raises UserError where libtpu knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    if not has_compiler():
        with contextlib.suppress(RuntimeError):  # there are devices already: of the whole topology, planned before
            jax.config.update("jax_num_cpu_devices", topology.count)
        return jax.devices()[: topology.count]
    # Slices smaller than a host are a part of one.
    more: dict[str, Any] = {"chips_per_host_bounds": (*topology.sizes, 1)[:3]} if topology.count < 4 else {}
    more |= {"num_slices": topology.slices} if topology.slices > 1 else {}
    grid = topology.name[topology.name.index(topology.kind) :]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=grid, **more)
    except Exception as error:  # whatever libtpu makes of a name: RuntimeError, ValueError, its own
        raise UserError(
            f"--topology {topology.name}: the compiler knows no such grid ({str(error).splitlines()[0]}). Slices of "
            "v5p are 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4 and multiples of that."
        ) from error
    return list(described.devices)
