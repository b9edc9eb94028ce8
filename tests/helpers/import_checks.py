"""Sharded import on eight simulated devices: run by multi_device/test_import.py in a process of its own.

Usage: python -m helpers.import_checks FOLDER, a model folder of several shards; eight devices share its vocabulary.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctpd_jax.errors import UserError
from ctpd_jax.models.hf import load_hf, safetensors, save_hf


def split(mesh: Mesh, axis_of: dict[int, str]):
    """A placement: matrices split along these axes from the end, where the sizes divide; everything else whole."""

    def placement(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        parts: list[str | None] = [None] * len(shape)
        for axis, name in axis_of.items():
            if len(shape) >= 2 and shape[axis] % mesh.shape[name] == 0:
                parts[axis] = name
        return NamedSharding(mesh, PartitionSpec(*parts))

    return placement


def by_stack(path: tuple[str, ...]) -> PartitionSpec:
    """The layers over four devices, the experts of each over two."""
    if "experts" in path:
        return PartitionSpec("x", "y")
    return PartitionSpec("x") if "layers" in path else PartitionSpec()


def check(folder: Path, placement, dtype: str) -> dict[str, int]:
    """The import under a placement against the plain one: values, the shards' sizes, what was read and held."""
    _, plain = load_hf(folder, dtype)
    memory, read = {}, []  # of each array that was read into: itself, and the bytes that were
    real_read, real_preadv = safetensors.read_into, os.preadv

    def read_into(tensor, name, out, index=()):
        owner = out
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        memory.setdefault(id(owner), (owner, []))[1].append(out.nbytes)
        real_read(tensor, name, out, index)

    def preadv(fd, buffers, offset):
        done = real_preadv(fd, buffers, offset)
        read.append(done)
        return done

    safetensors.read_into, os.preadv = read_into, preadv
    try:
        _, found = load_hf(folder, dtype, placement)
    finally:
        safetensors.read_into, os.preadv = real_read, real_preadv
    held = [sum(filled) for _, filled in memory.values()]
    assert all(owner.nbytes < sum(filled) + 4096 for owner, filled in memory.values())  # nothing larger than its part

    assert jax.tree.structure(plain) == jax.tree.structure(found)
    largest = parts = 0
    for (path, expected), leaf in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(found)):
        keys = tuple(entry.key for entry in path)
        sharding = placement(keys, leaf.shape) if callable(placement) else placement
        assert leaf.sharding == sharding and leaf.dtype == expected.dtype and leaf.committed
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected))
        distinct = {}
        for shard in leaf.addressable_shards:
            assert shard.data.shape == sharding.shard_shape(leaf.shape)
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(expected)[shard.index])
            distinct[str(shard.index)] = shard.data.nbytes
        largest, parts = max(largest, *distinct.values()), parts + len(distinct)
    assert len(held) == parts and max(held) == largest, (len(held), parts, max(held), largest)
    return {"read": sum(read), "held": max(held)}


def main() -> None:
    folder = Path(sys.argv[1])
    assert jax.device_count() == 8
    devices = np.array(jax.devices())
    line, grid = Mesh(devices, ("x",)), Mesh(devices.reshape(2, 4), ("x", "y"))
    whole = NamedSharding(line, PartitionSpec())
    size = {}
    for name, placement in {
        "whole on every device": whole,
        "rows": split(line, {-2: "x"}),
        "columns": split(line, {-1: "x"}),
        "both": split(grid, {-2: "x", -1: "y"}),
        "rows, twice each": split(grid, {-2: "y"}),
        "one device": jax.sharding.SingleDeviceSharding(jax.devices()[3]),
    }.items():
        for dtype in ("float32", "bfloat16"):
            size[name, dtype] = check(folder, placement, dtype)
            print(f"{name}, {dtype}: read {size[name, dtype]['read']:,} bytes, held {size[name, dtype]['held']:,}")
    # What several devices hold alike is read once, and a split by rows reads nothing twice.
    for name in ("rows", "rows, twice each", "one device"):
        assert size[name, "float32"]["read"] == size["whole on every device", "float32"]["read"]
    assert size["rows", "float32"]["held"] * 8 == size["whole on every device", "float32"]["held"]

    # The same int8 however it is cut: a scale is that of a whole row.
    _, rounded = load_hf(folder, "int8")
    for placement in (whole, split(line, {-2: "x"}), split(line, {-1: "x"}), split(grid, {-2: "x", -1: "y"})):
        _, found = load_hf(folder, "int8", placement)
        jax.tree.map(np.testing.assert_array_equal, found, rounded)
    assert any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(rounded))

    stacks = Mesh(devices.reshape(4, 2), ("x", "y"))
    _, params = load_hf(folder, sharding=lambda path, shape: NamedSharding(stacks, by_stack(path)))
    config, plain = load_hf(folder)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    save_hf(folder.with_name("again"), config, params)  # off eight devices
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder.with_name("again"))[1], plain)

    try:
        load_hf(folder, sharding=lambda path, shape: NamedSharding(line, PartitionSpec("x")))
    except UserError as error:
        assert "cannot be laid out" in str(error) and "model." in str(error), error
    else:
        raise AssertionError("four layers do not divide by eight")
    print("every import agrees")


if __name__ == "__main__":
    main()
