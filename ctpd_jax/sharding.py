"""One mesh, and where every array lies on it.

Axes: `data` (rows of a batch), `fsdp` (rows too, and every parameter cut along one dimension), `tensor` (heads, MLP
width and the vocabulary). A rule that matches nothing, or a size that does not divide, is an error: an array that is
silently whole on every device costs what it costs on one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ctpd_jax.errors import UserError
from ctpd_jax.processes.together import meet
from ctpd_jax.schema import Batch

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that a batch's rows are spread over

# The last module and the leaf of a parameter's path -> its axes, without the stacked layers (and experts) in front.
_OUT, _IN = ("tensor", "fsdp"), ("fsdp", "tensor")  # matrices [out, in] whose output, or input, is heads or MLP width
_COLUMN = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
_ROW = ("o_proj", "down_proj")
RULES: Mapping[tuple[str, str], tuple[str | None, ...]] = {
    ("embed_tokens", "weight"): ("tensor", "fsdp"),
    ("lm_head", "weight"): ("tensor", "fsdp"),
    ("gate", "weight"): (None, "fsdp"),
    **{(name, "weight"): _OUT for name in _COLUMN},
    **{(name, what): ("tensor",) for name in _COLUMN for what in ("bias", "scale")},
    **{(name, "lora_a"): (None, "fsdp") for name in _COLUMN},
    **{(name, "lora_b"): ("tensor", None) for name in _COLUMN},
    **{(name, "weight"): (None, "fsdp") for name in ("query", "student_to_teacher", "teacher_to_student")},
    **{(name, "weight"): _IN for name in _ROW},
    **{(name, "bias"): (None,) for name in _ROW},
    **{(name, "scale"): ("fsdp",) for name in _ROW},
    **{(name, "lora_a"): (None, "tensor") for name in _ROW},
    **{(name, "lora_b"): ("fsdp", None) for name in _ROW},
}


# ------------------------------------------------------------------------------------------------ the mesh


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of `sizes` {"data": ..., "fsdp": ..., "tensor": ...}; one may be -1, the devices that are left.

    On several slices of TPUs `data` goes between them, and what else it has within.

    Raises:
        UserError: sizes whose product is not the number of devices, or a `data` that does not divide over the slices.
    """
    # 1. The sizes as numbers, the -1 filled in.
    devices = jax.devices() if devices is None else list(devices)
    asked = [int(sizes[axis]) for axis in AXES]
    if any(size == 0 or size < -1 for size in asked) or asked.count(-1) > 1:
        raise UserError(f"The mesh {dict(sizes)} needs positive sizes, and at most one -1 for what is left.")
    fixed = math.prod(size for size in asked if size != -1)
    shape = [len(devices) // fixed if size == -1 else size for size in asked]
    # 2. A device that is left over would do nothing, and nobody would see it.
    if math.prod(shape) != len(devices):
        raise UserError(
            f"The mesh {' x '.join(f'{axis} {size}' for axis, size in zip(AXES, asked))} does not fit {len(devices)} "
            f"devices: the product of its sizes must be their number (config.mesh)."
        )
    types = (AxisType.Auto,) * len(AXES)
    # Devices of a single slice may not say which it is; those of other kinds are no slices.
    if (slices := len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})) <= 1:
        return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=devices)
    # 3. Between slices is a network, which is slow: only the sum of the gradient goes over it.
    data, *within = shape
    if data % slices:
        raise UserError(
            f"The mesh has data {data} on {slices} slices of TPUs; config.mesh.data must be a multiple of their "
            "number, so that no matrix is cut between slices."
        )
    parts = mesh_utils.create_hybrid_device_mesh((data // slices, *within), (slices, 1, 1), devices)
    return Mesh(parts, AXES, axis_types=types)


def row_devices(mesh: Mesh) -> int:
    """Return over how many parts the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
    """Return what jax.jit gives the compiler, as `compiler_options`, for large programs on a mesh.

    Left alone, the compiler for TPUs multiplies with a matrix that is cut over `fsdp` piece by piece, as the pieces
    come over the links, and adds the parts up in bfloat16, each time through all of the activations. A threshold that
    no product reaches has it gather the matrix, which it does while it multiplies with the one before.
    """
    on_tpu = mesh is not None and mesh.devices.flat[0].platform == "tpu"
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if on_tpu else None


# ------------------------------------------------------------------------------------------------ parameters


def param_spec(path: Sequence[str], shape: Sequence[int]) -> P:
    """Return the axes of a parameter by its path: ("model", "layers", "self_attn", "q_proj", "weight").

    Raises:
        UserError: no rule for such a name.
    """
    # Norms are small, and whole on every device.
    if any("norm" in name for name in path[-2:]):
        return P(*(None,) * len(shape))
    rule = RULES.get((path[-2], path[-1]))
    if rule is None or len(rule) > len(shape):
        raise UserError(f"No rule says how the parameter {'.'.join(path)} {tuple(shape)} lies on the mesh.")
    # In front are the stacked layers, and the experts.
    return P(*(None,) * (len(shape) - len(rule)), *rule)


def param_sharding(mesh: Mesh) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]:
    """Return the function (path, shape) -> the parameter's sharding, as `load_hf` takes it.

    Raises:
        UserError: no rule, or a dimension that its axis does not divide.
    """

    def sharding(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        # Named here: JAX's own error, much later, knows no parameter.
        spec = param_spec(path, shape)
        for size, axis in zip(shape, spec):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"The parameter {'.'.join(path)} {tuple(shape)} does not divide: {size} over the "
                    f"{mesh.shape[axis]} devices of the axis {axis!r}. Choose another config.mesh."
                )
        return NamedSharding(mesh, spec)

    return sharding


def shard_shapes(mesh: Mesh, shapes: Any) -> Any:
    """Return a tree of parameters' shapes as jax.ShapeDtypeStruct with the sharding of each."""
    sharding = param_sharding(mesh)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(entry.key for entry in path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(names, leaf.shape))

    return jax.tree.map_with_path(place, shapes)


def spread(sharding: Any, shape: Sequence[int]) -> Any:
    """Return a sharding by which the copies of every part hold a piece of it each, where it can be cut so.

    Read like this, an array is read once, however many devices are to hold all of it. The cut is the one by which Orbax
    has the copies of a part write it together, so that no piece that was written is read twice either.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    # 1. The axes along which there are copies.
    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    cut = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec]
    copies = [axis for axis in sharding.mesh.axis_names if all(axis not in axes for axes in cut)]
    if (count := math.prod(sharding.mesh.shape[axis] for axis in copies)) == 1:
        return sharding
    # 2. The first dimension of a part that they divide.
    for dimension, size in enumerate(sharding.shard_shape(tuple(shape))):
        if size and size % count == 0:
            cut[dimension] += tuple(copies)
            return NamedSharding(sharding.mesh, P(*cut))
    return sharding


def gathered(array: Any, sharding: Any) -> Any:
    """Return an array that was read as `spread` says as it is to lie: the devices hand the pieces on.

    With None for the sharding it stays where it is.
    """
    if sharding is None or array.sharding == sharding:
        return array
    # Waited for: on CPUs two programs that exchange something at once may block each other for ever.
    return jax.block_until_ready(_laid(sharding)(array))


@lru_cache(maxsize=64)
def _laid(sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


def check_heads(mesh: Mesh, heads: int, kv_heads: int, where: str) -> None:
    """Raise UserError where the heads do not divide over the axis `tensor`."""
    # Their projections may divide all the same, in the middle of a head.
    tensor = mesh.shape["tensor"]
    if heads % tensor or kv_heads % tensor:
        raise UserError(
            f"{where} has {heads} heads and {kv_heads} key-value heads; both must divide by the mesh's tensor axis "
            f"({tensor})."
        )


# ------------------------------------------------------------------------------------------------ batches


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Place a batch, the same on every process, on the mesh: each process hands over only what its devices hold."""
    # What has a row for its first axis is spread by rows; what belongs to pairs is whole everywhere.
    by_row, whole = NamedSharding(mesh, P(ROWS)), replicated(mesh)
    shardings = jax.tree.map(lambda _: by_row, batch)._replace(**dict.fromkeys(batch.per_pair(), whole))
    return jax.tree.map(_place, batch, shardings)


def place_rows(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Place an array [R, ...], the same on every process, spread by rows."""
    return _place(array, NamedSharding(mesh, P(ROWS)))


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


# ------------------------------------------------------------------------------------------------ inside a program


def on_own_rows(mesh: Mesh | None, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `function(q, k, v, extra)` as it runs on every device's own rows and heads.

    q, k, v are [R, T, heads, D], and every leaf of `extra` is [R, ...], the same for all heads.
    """
    # XLA cannot cut a kernel in parts by itself.
    if mesh is None or mesh.devices.size == 1:
        return function
    heads, rows = P(ROWS, None, "tensor", None), P(ROWS)
    return jax.shard_map(function, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)


def constrain(mesh: Mesh | None, array: jax.Array, *axes: Any) -> jax.Array:
    """Say where an intermediate array lies: one entry of `axes` a dimension, None for a whole one."""
    if mesh is None or mesh.devices.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P(*axes)))


# ------------------------------------------------------------------------------------------------ several processes


def first_process() -> bool:
    """Return whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        meet(name)


def told_by_first(look: Callable[[], Any]) -> Any:
    """Return what `look` finds on the first process, as JSON holds it, whatever a file system shows to each of them.

    A UserError of the first process is raised by all of them, and an OSError as one.
    """
    if jax.process_count() == 1:
        return look()
    # 1. The first process looks.
    found: tuple[str, Any] = ("", None)
    if first_process():
        try:
            found = "found", look()
        except UserError as error:
            found = "refused", str(error)
        except OSError as error:
            # A full disk, a share that has gone: the others must not wait for an answer.
            found = "refused", f"{error.filename or 'A file'}: {error.strerror or error}."
    # 2. That may take its time.
    meet("the first process has looked")
    # 3. All of them learn the size, then the answer; there is no broadcast of texts.
    text = np.frombuffer(json.dumps(found).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    told = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    how, value = json.loads(np.asarray(told, np.uint8).tobytes())
    # 4. Where it failed, it fails everywhere.
    if how == "refused":
        raise UserError(value)
    return value


def summed_over_processes(array: np.ndarray) -> np.ndarray:
    """Return the sum of the arrays, of one shape and dtype, that all processes hand in; every one of them gets it."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.process_allgather(array)).sum(axis=0)


def all_processes(found: bool) -> bool:
    """Return whether every process has found it so; all of them ask, and get one answer."""
    if jax.process_count() == 1:
        return found
    return not summed_over_processes(np.array(not found, np.int32))


def patiently(look: Callable[[], T | None], seconds: float = 60.0) -> T | None:
    """Return what `look` finds; several processes, which share a file system, ask it again for up to `seconds`."""
    # NFS shows a process what others have written only after a while, and that a file is not there for as long.
    end = time.monotonic() + (seconds if jax.process_count() > 1 else 0.0)
    while (found := look()) is None and time.monotonic() < end:
        time.sleep(min(1.0, seconds / 10))
    return found


def on_host(array: jax.Array) -> np.ndarray:
    """Return a small array whole; of one that lies on several processes every process asks, and gets it."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def pieces_on_host(leaf: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array on the host, along its first axis, wherever it lies; every process calls it.

    An array of several processes comes in pieces of about 256 MB: whole, a piece lies on every device, and all
    layers' matrices of a large model would not fit there.
    """
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
        yield np.asarray(leaf)
    else:
        yield from _pieces(leaf, most=2**28)


def _pieces(leaf: jax.Array, most: int) -> Iterator[np.ndarray]:
    everywhere = NamedSharding(leaf.sharding.mesh, P())  # type: ignore[attr-defined]  # parameters lie by names
    rows = leaf.shape[0] if leaf.ndim else 1
    size = min(max(1, most * rows // max(leaf.nbytes, 1)), rows)

    @partial(jax.jit, static_argnums=2, out_shardings=everywhere)
    def cut(leaf: jax.Array, first: int, size: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, first, size) if leaf.ndim else leaf

    for first in range(0, rows, size):
        yield np.asarray(cut(leaf, first, min(size, rows - first)).addressable_data(0))
