"""Reading and writing safetensors files, a tensor at a time.

The format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, the data. Read with
`os.preadv` straight into the destination: a memory map would count the whole file as resident, and numpy does not know
bfloat16 without help. Nothing here can execute code from the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ctpd_jax.artifacts import refuse_impostor
from ctpd_jax.errors import UserError
from ctpd_jax.processes import preempt

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 1 << 20  # bytes read, checked and converted at a time: they stay in the processor's cache
_MAX_HEADER = 100_000_000  # the format's own limit
# What `write` takes: a tensor's name, its shape, its dtype in the file, and a function that gives the array.
TensorToWrite = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    file: Path
    code: str  # the format's name of the dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name. Raises UserError if the file is not a whole safetensors file."""
    # 1. The header: its length in 8 bytes, then JSON.
    if not file.is_file():
        raise UserError(f"{file} is not a file. Fetch it again.")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(64)
        refuse_impostor(file, start)
        length = int.from_bytes(start[:8], "little")
        if size < 10 or not 2 <= length <= _MAX_HEADER:
            raise UserError(f"{file} is not a safetensors file. Fetch the file again.")
        if length > size - 8:
            raise UserError(f"{file} was cut short within its header, or is no safetensors file. Fetch it again.")
        stream.seek(8)
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_each_once)
            header.pop("__metadata__", None)
            spans = [(*_sizes(entry["data_offsets"], 2), name) for name, entry in header.items()]
            tensors = {
                name: Tensor(file, str(header[name]["dtype"]), _sizes(header[name]["shape"]), 8 + length + begin)
                for begin, _, name in spans
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is not a safetensors file: its header cannot be read ({error}).") from None
    # 2. As the format has it, the data follow one another without a gap and fill the file.
    filled = 0
    for begin, end, name in sorted(spans):
        dtype, shape = DTYPES.get(tensors[name].code), tensors[name].shape
        if begin != filled or end < begin:
            raise UserError(f"{file}: the data of tensor {name} overlap another's, or leave a gap. Fetch it again.")
        if dtype and end - begin != dtype.itemsize * math.prod(shape):
            raise UserError(f"{file}: the data of tensor {name} do not have the size of its shape. Fetch it again.")
        if 8 + length + end > size:
            raise UserError(f"{file} was cut short: tensor {name} ends past the end. Fetch the file again.")
        filled = end
    if 8 + length + filled < size:
        raise UserError(f"{file} goes on after its last tensor. Fetch the file again.")
    return tensors


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a JSON object of its fields. Of two of one name JSON would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _sizes(values: list[int], count: int | None = None) -> tuple[int, ...]:
    """Return what has to be a list of so many integers that are not negative."""
    # As strict as the format: int() would make a size of true, of "3" and of 3.7.
    if not isinstance(values, list) or count not in (None, len(values)):
        raise ValueError("a list of sizes is none")
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"{str(values)[:60]} are no sizes")
    return tuple(values)


def read_into(tensor: Tensor, name: str, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
    """Fill `out` with the tensor, or with the part of it that `index` says, converting to out's dtype.

    Args:
        tensor: from `read_header`.
        name: the tensor's, for messages.
        out: a contiguous array of the shape of the tensor or of the part. Widening is exact.
        index: contiguous slices of the first axes; those that are not named are read whole. Of the file only the rows
            that the first slice says are read.

    Raises:
        UserError: a dtype that is no floating point, a file that ends too early, or a number that is not finite or that
            out's dtype cannot hold.
    """
    if tensor.code not in DTYPES:
        raise UserError(
            f"{tensor.file}: tensor {name} has dtype {tensor.code}; only {', '.join(DTYPES)} are supported "
            f"(quantized weights are not)."
        )
    # 1. What is asked for: rows of the first axis, and a part of the other ones.
    dtype, shape = DTYPES[tensor.code], tensor.shape or (1,)
    rows, *others = (range(size)[part] for size, part in zip(shape, (*index, *[slice(None)] * len(shape))))
    out = out if tensor.shape else out.reshape(1)
    if out.shape != (len(rows), *map(len, others)):
        raise ValueError(f"{name}: a part of shape {(len(rows), *map(len, others))} does not fit into {out.shape}")
    # 2. Piece by piece: whole rows are read, one after the other in the file.
    whole = others == [range(size) for size in shape[1:]]
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    offset = tensor.offset + rows.start * row_bytes
    fd = os.open(tensor.file, os.O_RDONLY)
    try:
        step = max(1, _PIECE // max(1, row_bytes))
        columns = tuple(slice(part.start, part.stop) for part in others)
        # What needs no conversion goes straight to its place; the rest by way of a small buffer.
        piece = np.empty((min(step, len(rows)), *shape[1:]), dtype)
        for start in range(0, len(rows), step):
            target = out[start : start + step]
            part = target if whole and dtype == out.dtype else piece[: len(target)]
            _read_bytes(fd, tensor.file, _bytes(part), offset + start * row_bytes)
            refuse_not_finite(part, f"{tensor.file}: tensor {name}")
            if part is not target:
                convert(part[(slice(None), *columns)], target, f"{tensor.file}: tensor {name}")
    finally:
        os.close(fd)


def convert(values: np.ndarray, out: np.ndarray, what: str) -> None:
    """Write finite numbers into `out`, in its dtype. Raises UserError, about `what`, for one that it cannot hold."""
    with np.errstate(over="ignore"):
        out[...] = values
    if ml_dtypes.finfo(out.dtype).max < ml_dtypes.finfo(values.dtype).max:
        refuse_not_finite(out, what, values)


def converted(values: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Return the array in `dtype`. Raises UserError, about `what`, for what is not finite, or not in `dtype`."""
    refuse_not_finite(values, what)
    if values.dtype == dtype:
        return values
    out = np.empty(values.shape, dtype)
    convert(values, out, what)
    return out


def refuse_not_finite(array: np.ndarray, what: str, source: np.ndarray | None = None) -> None:
    """Raise UserError, about `what`, for NaN or infinity; `source` is what the array was converted from."""
    # By the bits of the exponent: numpy's isfinite is slow for bfloat16.
    size = array.dtype.itemsize
    limit = np.array(np.inf, array.dtype).view(f"i{size}")  # what is not finite has these bits, or more
    signed, unsigned, flat = array.view(f"i{size}"), array.view(f"u{size}"), array.reshape(-1)
    if not array.size or (signed.max() < limit and unsigned.max() < limit.view(f"u{size}") | 1 << 8 * size - 1):
        return
    # Which number it is, and where, for the message alone.
    at = int(np.flatnonzero(~np.isfinite(flat.astype(np.float64)))[0])
    found = float(flat[at] if source is None else np.asarray(source).reshape(-1)[at])
    place = ", ".join(str(int(index)) for index in np.unravel_index(at, array.shape))
    if math.isfinite(found):
        raise UserError(
            f"{what} holds {found:.6g} at [{place}], beyond the range of {array.dtype}; take another dtype."
        )
    raise UserError(f"{what} holds {found} at [{place}]: the weights are damaged, or their training went astray.")


def same_values(first: Tensor, second: Tensor, name: str) -> bool:
    """Tell whether two tensors are equal as float32; `name` is what they are called, for messages."""
    if first.shape != second.shape:
        return False
    pairs = zip(_pieces(first, name, np.dtype(np.float32)), _pieces(second, name, np.dtype(np.float32)))
    return all(np.array_equal(one, other) for (_, one), (_, other) in pairs)


def holds(tensor: Tensor, name: str, values: np.ndarray) -> bool:
    """Tell whether the file has exactly this array under the name: dtype, shape and every byte."""
    if DTYPES.get(tensor.code) != values.dtype or tensor.shape != values.shape:
        return False
    pieces = _pieces(tensor, name, values.dtype)
    return all(np.array_equal(_bytes(found), _bytes(np.asarray(values[at], order="C"))) for at, found in pieces)


def _pieces(tensor: Tensor, name: str, dtype: np.dtype) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Read a tensor some rows at a time: where each piece lies, and the piece in `dtype`."""
    rows, *others = tensor.shape or (1,)
    step = max(1, _PIECE // max(1, 8 * math.prod(others)))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        at = (slice(start, stop),) if tensor.shape else ()
        piece = np.empty((stop - start, *others) if tensor.shape else (), dtype)
        read_into(tensor, name, piece, at)
        yield at, piece


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _read_bytes(fd: int, file: Path, out: np.ndarray, offset: int) -> None:
    view, done = out.data, 0
    while done < len(view):
        # A read may give less than was asked for.
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise UserError(f"{file} was cut short while it was read. Fetch the file again.")
        done += count


def write(file: Path, tensors: Iterable[TensorToWrite]) -> None:
    """Write tensors in the order given; each is asked for its array when its turn comes."""
    # 1. The header. Without `format: pt` transformers refuses the file.
    entries = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype, _ in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    # 2. The data, of which one tensor at a time is in memory.
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype, fetch in entries:
            preempt.check("the model that was being written is written anew")
            array = np.asarray(fetch(), dtype=dtype, order="C")
            if array.shape != shape:
                raise ValueError(f"tensor {name} has shape {array.shape}, announced was {shape}")
            stream.write(_bytes(array).data)
        stream.flush()
        os.fsync(stream.fileno())
