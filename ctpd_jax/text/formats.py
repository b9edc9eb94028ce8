"""File formats of rows: an opened file -> (number of the row, its columns), lazily.

    .jsonl, .json       one JSON object a line, or one array of objects, whatever the name
    .csv, .tsv          a header and one row a record; , ; or tab, as the header has it
    .parquet            as the hub stores it

All but .parquet also with .gz or .zst. Rows are counted from 1, in .jsonl as the lines of the file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ctpd_jax.errors import UserError
from ctpd_jax.text.columns import LeftOut

Numbered = tuple[int, Mapping[str, Any] | LeftOut]

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst")
ENDINGS = tuple(f"{form}{packed}" for form in FORMATS for packed in ("", *PACKED) if form != ".parquet" or not packed)
CHUNK = 1 << 20  # characters of an array that are looked at together
BOM = b"\xef\xbb\xbf"
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # the elements of an array


def unpacked(path: Path, file: BinaryIO) -> contextlib.AbstractContextManager[BinaryIO]:
    """Open the stream inside a .zst file; leave any other. pyarrow notices a file cut short, zstandard does not."""
    if not path.name.endswith(".zst"):
        return contextlib.nullcontext(file)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))


def rows_of(path: Path, file: BinaryIO) -> Iterator[Numbered]:
    """Read the rows of an opened file, by its ending. Raises UserError where it cannot be read on."""
    suffix = next(suffix for suffix in reversed(path.suffixes) if suffix not in PACKED)
    if suffix == ".parquet":
        return _parquet(path, file)
    return _records(path, file) if suffix in (".csv", ".tsv") else _json(path, file)


def _line(line: bytes) -> Mapping[str, Any] | LeftOut:
    try:
        return _object(json.loads(line.decode("utf-8"), object_pairs_hook=_every_field))
    except UnicodeDecodeError as error:
        return LeftOut("the line is not valid UTF-8", f"{error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return LeftOut("the line is not valid JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return LeftOut("the line cannot be read as JSON", str(error))


def _object(value: Any) -> Mapping[str, Any] | LeftOut:
    return value if isinstance(value, dict) else LeftOut("not a JSON object", f"it holds {type(value).__name__}")


def _every_field(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the fields of an object; what stands before a field of the same name is kept, to be judged."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            fields[f"{name} (twice)"] = fields[name]
        fields[name] = value
    return fields


def _json(path: Path, file: Any) -> Iterator[Numbered]:
    """Read an array, element by element; anything else is read as lines.

    By Python's own decoder, so that a row is the same in both: ijson refuses NaN, and writes "?" for half a surrogate.
    """
    # 1. What it is, by its first bytes.
    head = file.peek(64).removeprefix(BOM)
    if re.match(rb"\s*\{\s*\n", head):
        raise UserError(f"{path} holds an object over several lines; write an array of rows, or one object a line.")
    if not re.match(rb"\s*\[\s*(\{|$)", head):
        # 2. Lines end at "\n" only: str.splitlines would also cut at U+2028 inside a text.
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, _line(line)
        return
    # 3. Of an array no more is in memory than a chunk and one element.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    decode = json.JSONDecoder(object_pairs_hook=_every_field).raw_decode
    number, place, buffer = 0, 0, text.read(CHUNK).lstrip()[1:]
    while True:
        place = _BETWEEN.match(buffer, place).end()  # type: ignore[union-attr]
        if buffer.startswith("]", place):
            break
        try:
            row, place = decode(buffer, place)
        except (ValueError, RecursionError) as error:  # the rest of the element may be in the next chunk
            more = text.read(max(CHUNK, len(buffer) - place))
            if not more:
                raise UserError(f"{path}:{number + 1}: the array cannot be read on as JSON ({error}).") from None
            buffer, place = buffer[place:] + more, 0
            continue
        number += 1
        yield number, _object(row)
    if (buffer[place + 1 :] + text.read(CHUNK)).strip():
        raise UserError(f"{path}: something follows the array of {number} rows; write one array, or one object a line.")


def _records(path: Path, file: BinaryIO) -> Iterator[Numbered]:
    csv.field_size_limit((1 << 31) - 1)  # of Python's, 128 KB: an answer may be longer
    # Bytes that are no UTF-8 become lone surrogates, which no prompt and no answer may hold.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # The delimiter is the one that the header has most of.
    head = text.readline()
    delimiter = max(",;\t", key=head.count)
    columns = next(csv.reader([head], delimiter=delimiter), [])
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: two columns of the header have the same name ({', '.join(columns)}).")
    rows = csv.DictReader(text, columns, restkey="(beyond the header)", delimiter=delimiter, strict=True)
    for number in itertools.count(1):
        try:
            yield number, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise UserError(
                    f"{path}:{number}: a quotation mark is never closed, or the file was cut off."
                ) from None
            yield number, LeftOut("the row is no valid CSV", str(error))


def _values(column: Any) -> list[Any]:
    """Return a column in Python's types; what they cannot hold (a nanosecond, the year 10,000) as its number."""

    def value(cell: Any) -> Any:
        try:
            return cell.as_py()
        except UnicodeDecodeError as error:
            return error.object  # bytes that no prompt and no answer may hold
        except (ValueError, OverflowError):
            return getattr(cell, "value", None)

    # Whole columns are quick; cell by cell only where one of them is no value that Python has.
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [value(cell) for cell in column]


def _parquet(path: Path, file: BinaryIO) -> Iterator[Numbered]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        source = pyarrow.parquet.ParquetFile(file)
        names = source.schema_arrow.names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns have the same name ({', '.join(names)}).")
        # A row group may be larger than memory has room for: a few rows at a time.
        for batch in source.iter_batches(batch_size=256):
            for row in zip(*map(_values, batch.columns)):
                number += 1
                yield number, dict(zip(names, row))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}:{number + 1}: the file cannot be read as Parquet ({str(error).strip()}).") from None
