"""Preference data from a file, TFDS or the Hugging Face hub -> PreferencePair.

    spec                                        what is read
    pairs.jsonl, pairs.jsonl.gz                 one JSON object a line; the file is the split
    data/{split}.jsonl                          the same, one file per split
    data                                        a folder: data/<split>.jsonl or data/<split>.jsonl.gz
    tfds:name[/config][:version]                a prepared TFDS data set (ArrayRecord; TensorFlow is not needed)
    tfds:package.module:name[/config]           the same after importing the module that registers the builder
    tfds:folder/with/dataset_info               a prepared TFDS folder
    hf:owner/name[:config]                      a data set of the Hugging Face hub (needs the extra "hub")

The column layouts are in layouts.py. Rows without a usable preference are left out and counted, never silently.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Counters, Message, PreferencePair
from ctpd_jax.text.layouts import HH_SEPARATOR, LeftOut, RawPair, read_row

Row = tuple[str, Mapping[str, Any]]  # where it stands ("train.jsonl:17"), and its columns


def load_preferences(
    spec: str,
    split: str = "train",
    limit: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    separator: str = HH_SEPARATOR,
) -> tuple[list[PreferencePair], Counters]:
    """Reads preference pairs.

    Args:
      spec: what to read; see the table at the top of this file.
      split: the part to read, in TFDS and Hugging Face also with a slice ("train[:1000]").
      limit: stop after this many pairs have been kept; None for all.
      data_dir: where TFDS keeps prepared data; its default where None. Other sources take no notice of it.
      separator: what stands between prompt and answer where a row holds both as one text.

    Returns:
      The pairs in the order of the source, and the report: "rows", "kept", and one count per reason for leaving out
      ("left out: identical answers", ...). A pair's id is a hash of its texts, so it names the same pair whatever
      the order of the file, and a changed text is another id; exact repeats get "-2", "-3", ... appended.

    Raises:
      UserError: nothing there, an unreadable row (named as file:line), an unknown layout, or no usable pair at all.
    """
    if limit is not None and limit < 1:
        raise UserError(f"The limit on preference pairs is {limit}; it must be at least 1.")
    report = Counters()
    pairs: list[PreferencePair] = []
    seen: dict[str, int] = {}
    for source, row in _rows(spec, split, data_dir):
        report.add("rows")
        try:
            raw = read_row(row, separator, report)
        except LeftOut as reason:
            report.add(str(reason))
            continue
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        identity = pair_id(raw.prompt, raw.chosen, raw.rejected)
        seen[identity] = seen.get(identity, 0) + 1
        if seen[identity] > 1:
            report.add("exact repeats")
            identity = f"{identity}-{seen[identity]}"
        pairs.append(PreferencePair(identity, raw.prompt, raw.chosen, raw.rejected, source))
        if limit is not None and len(pairs) >= limit:
            break
    report.add("kept", len(pairs))
    if not pairs:
        reasons = "; ".join(f"{name}: {number}" for name, number in report.counts.items())
        raise UserError(f'"{spec}" (split "{split}") holds no usable preference pair ({reasons}).')
    return pairs, report


def pair_id(prompt: Iterable[Message], chosen: str, rejected: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a pair's texts and roles."""
    texts = [[[message.role, message.content] for message in prompt], chosen, rejected]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=True).encode("ascii")).hexdigest()[:16]


def _rows(spec: str, split: str, data_dir: str | os.PathLike[str] | None) -> Iterator[Row]:
    if spec.startswith("tfds:"):
        return _tfds_rows(spec, split, data_dir)
    if spec.startswith("hf:"):
        return _hub_rows(spec, split)
    return _jsonl_rows(_jsonl_path(spec, split))


# ------------------------------------------------------------------------------------------------ JSONL


def _jsonl_path(spec: str, split: str) -> Path:
    path = Path(spec.replace("{split}", split)).expanduser()
    if path.is_dir():
        candidates = [path / f"{split}{ending}" for ending in (".jsonl", ".jsonl.gz")]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise UserError(f'The folder "{path}" holds neither {candidates[0].name} nor {candidates[1].name}.')
    if not path.is_file():
        raise UserError(
            f'There is no preference file "{path}"; give a .jsonl file, a folder of them, "tfds:name" or '
            '"hf:owner/name".'
        )
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f'"{path}" is not a .jsonl or .jsonl.gz file; write one JSON object a line.')
    return path


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """Lines end at "\\n" only: str.splitlines would also cut at U+2028 inside a text."""
    opened: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}:{number + 1}: the compressed file is damaged ({error}); fetch or make it again."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def _json_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the line is not valid UTF-8 ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: the line is not valid JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{where}: the line cannot be read as JSON ({error}).") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: the line holds {type(row).__name__}, not a JSON object.")
    return row


# ------------------------------------------------------------------------------------------------ TFDS, hub


def _tfds_rows(spec: str, split: str, data_dir: str | os.PathLike[str] | None) -> Iterator[Row]:
    name = spec.removeprefix("tfds:")
    module, _, rest = name.partition(":")
    try:
        import tensorflow_datasets as tfds

        if "." in module and "/" not in module and rest:
            importlib.import_module(module)  # registers the builder
            name = rest
    except ImportError as error:
        raise UserError(f'"{spec}" cannot be read: {error}.') from None
    try:
        if Path(name, "dataset_info.json").is_file():
            source = tfds.builder_from_directory(name).as_data_source(split)
        else:
            builder = tfds.builder(name, data_dir=os.fspath(data_dir) if data_dir is not None else None)
            builder.download_and_prepare(file_format="array_record")
            source = builder.as_data_source(split)
    except Exception as error:  # of TFDS, of a builder, or of whatever downloads for it
        raise _cannot_open(f'TFDS cannot open "{name}", split "{split}"', error) from error
    for index in range(len(source)):
        yield f"{spec}[{split}]:{index}", source[index]


def _hub_rows(spec: str, split: str) -> Iterator[Row]:
    name, _, config = spec.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f'"{spec}" needs the package "datasets"; install ctpd-jax[hub].') from None
    try:
        rows = load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds, from HTTP to its own offline mode
        raise _cannot_open(f'The Hugging Face data set "{name}", split "{split}", cannot be opened', error) from error
    for index, row in enumerate(rows):
        yield f"{spec}[{split}]:{index}", row


def _cannot_open(what: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    network = " Check the network." if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else ""
    return UserError(f"{what} ({reason}).{network}")


__all__ = ["RawPair", "load_preferences", "pair_id"]
