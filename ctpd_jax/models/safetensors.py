"""Reading and writing safetensors files, a tensor at a time.

The format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, the data. Read with
`os.preadv` straight into the destination: a memory map would count the whole file as resident, and numpy does not know
bfloat16 without help. Nothing here can execute code from the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ctpd_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 1 << 24  # bytes converted at a time
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    file: Path
    code: str  # the format's name of the dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file by name. Raises UserError if the file is not a whole safetensors file."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UserError(f"{file} is not a safetensors file, or was cut short: its header length is {length}.")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                tensors[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
                itemsize = DTYPES[entry["dtype"]].itemsize if entry["dtype"] in DTYPES else None
                if itemsize and end - begin != itemsize * math.prod(entry["shape"]):
                    raise UserError(f"{file}: the data of tensor {name} does not have the size of its shape.")
                if 8 + length + end > size:
                    raise UserError(f"{file} was cut short: tensor {name} ends past the end. Fetch the file again.")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file} is not a safetensors file: its header cannot be read ({error}).") from None
    return tensors


def read_into(tensor: Tensor, name: str, out: np.ndarray) -> None:
    """Fill `out`, a contiguous array of the tensor's shape, converting to its dtype (exact when widening)."""
    if tensor.code not in DTYPES:
        raise UserError(
            f"{tensor.file}: tensor {name} has dtype {tensor.code}; only {', '.join(DTYPES)} are supported "
            f"(quantized weights are not)."
        )
    dtype = DTYPES[tensor.code]
    flat = out.reshape(-1)
    fd = os.open(tensor.file, os.O_RDONLY)
    try:
        if dtype == out.dtype:
            _read_bytes(fd, tensor.file, flat.view(np.uint8), tensor.offset)
            return
        step = _PIECE // dtype.itemsize
        piece = np.empty(min(step, flat.size), dtype)
        for start in range(0, flat.size, step):
            part = piece[: min(step, flat.size - start)]
            _read_bytes(fd, tensor.file, part.view(np.uint8), tensor.offset + start * dtype.itemsize)
            flat[start : start + part.size] = part
    finally:
        os.close(fd)


def _read_bytes(fd: int, file: Path, out: np.ndarray, offset: int) -> None:
    view = out.data
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise UserError(f"{file} was cut short while it was read. Fetch the file again.")
        done += count


def write(
    file: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    dtype_of: Callable[[str], np.dtype],
) -> None:
    """Write tensors in the order given: (name, shape, a function that gives the array, called when its turn comes).

    `format: pt` stands in the metadata, without which transformers refuses the file.
    """
    entries = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in entries:
        end = offset + math.prod(shape) * dtype_of(name).itemsize
        header[name] = {"dtype": _CODES[dtype_of(name)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape, fetch in entries:
            array = np.ascontiguousarray(fetch(), dtype=dtype_of(name))
            if array.shape != shape:
                raise ValueError(f"tensor {name} has shape {array.shape}, announced was {shape}")
            stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
