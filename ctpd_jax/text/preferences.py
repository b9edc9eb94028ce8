"""Preference data from a file, TFDS or the Hugging Face hub -> PreferencePair.

    spec                                        what is read
    pairs.jsonl, .json, .csv, .tsv, .parquet    the file is the split; formats.py; also .gz and .zst
    data/{split}.jsonl                          the same, one file per split
    data                                        a folder: data/<split>.<ending>, or shards data/<split>-*.<ending>
    tfds:name[/config][:version]                a prepared TFDS data set (ArrayRecord; TensorFlow is not needed)
    tfds:package.module:name[/config]           the same after importing the module that registers the builder
    tfds:folder/with/dataset_info               a prepared TFDS folder
    hf:owner/name[:config]                      a data set of the Hugging Face hub (needs the extra "hub")

The column layouts are in answers.py. A row is used, or left out and counted by reason; errors are of the whole source.
"""

from __future__ import annotations

import gzip
import importlib
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctpd_jax.artifacts import is_url
from ctpd_jax.buckets.objects import at_hand
from ctpd_jax.errors import UserError
from ctpd_jax.schema import Counters, Message, PreferencePair
from ctpd_jax.text.answers import UNKNOWN_LAYOUT
from ctpd_jax.text.columns import AS_IT_STANDS, LeftOut, Reading, quoted
from ctpd_jax.text.dialogue import HH_SEPARATOR
from ctpd_jax.text.formats import ENDINGS, rows_of, unpacked
from ctpd_jax.text.read_row import SEEN, TEMPLATED, UNKNOWN, read_row

Located = tuple[str, Mapping[str, Any] | LeftOut]  # where a row stands ("train.jsonl:17"), and its columns
NEARLY_ALL = 0.9  # of the rows
STAND_INS = {"chosen": "1", "rejected": "2"}  # answers of a row that has a prompt alone


def load_preferences(
    spec: str,
    split: str = "train",
    limit: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    separator: str = HH_SEPARATOR,
    reading: Reading = AS_IT_STANDS,
) -> tuple[list[PreferencePair], Counters]:
    """Read preference pairs.

    Args:
      spec: what to read; see the table at the top of this file.
      split: the part to read, in TFDS and Hugging Face also with a slice ("train[:1000]").
      limit: stop after this many pairs have been kept; None for all.
      data_dir: where TFDS keeps prepared data; its default where None.
      separator: what stands between prompt and answer where a row holds both as one text.
      reading: names of columns, and what is to be done with templates and ranks.

    Returns:
      The pairs in the order of the source, and the report: "rows", "kept", and one count per reason for leaving out
      ("left out: identical answers", ...) with the first rows of each. A pair's id is a hash of its texts; exact
      repeats get "-2", "-3", ... appended.

    Raises:
      UserError: nothing there, a file that cannot be read on, too few usable pairs, or texts that carry a template.
    """
    pairs, report = read_preferences(spec, split, limit, data_dir, separator, reading)
    where = f'"{spec}" (split "{split}")'
    refuse_templates(report, where, reading)
    require_kept(report, len(pairs), where, reading.min_kept)
    return pairs, report


def read_preferences(
    spec: str,
    split: str,
    limit: int | None,
    data_dir: str | os.PathLike[str] | None,
    separator: str,
    reading: Reading,
) -> tuple[list[PreferencePair], Counters]:
    """Do what `load_preferences` does, without a judgement of what came of it."""
    if limit is not None and limit < 1:
        raise UserError(f"The limit on preference pairs is {limit}; it must be at least 1.")
    most = math.inf if limit is None else limit
    report = Counters()
    pairs: list[PreferencePair] = []
    seen: Counter[str] = Counter()
    for source, row in _rows(spec, split, data_dir):
        report.add("rows")
        for found in [row] if isinstance(row, LeftOut) else read_row(row, separator, report, reading):
            if len(pairs) >= most:
                break
            # 1. Not usable: the reason is counted, with the first rows that it was met in.
            if isinstance(found, LeftOut):
                report.leave_out(found.reason, source, found.detail)
                for name in found.fields:
                    report.note(UNKNOWN, name, most=50)
                continue
            # 2. Usable: the id says which of its repeats it is.
            seen[found.id] += 1
            times = seen[found.id]
            if times > 1:
                report.add("exact repeats")
            if repeating := _repeats_of_prompt(found):
                report.add("answers that repeat the prompt", repeating)
            pairs.append(replace(found, id=f"{found.id}-{times}" if times > 1 else found.id, source=source))
        if len(pairs) >= most:
            break
    report.add("kept", len(pairs))
    return pairs, report


def load_prompts(
    spec: str, split: str, limit: int | None, reading: Reading = AS_IT_STANDS
) -> tuple[list[tuple[Message, ...]], Counters]:
    """Read the distinct prompts of a data set, the first `limit` of them, in its order.

    Rows may hold a prompt and no answers. Where there are answers, it does not matter which is the better one.

    Raises:
      UserError: nothing there, a file that cannot be read on, or too few usable rows.
    """
    report, prompts = Counters(), dict[tuple[Message, ...], None]()
    readable = 0
    for source, row in _rows(spec, split, None):
        report.add("rows")
        found = [row] if isinstance(row, LeftOut) else read_row(row, HH_SEPARATOR, report, reading)
        # A prompt alone is read as one of a row with answers: any two will do.
        first = found[0] if found else None
        if (
            isinstance(first, LeftOut)
            and first.reason == f"left out: {UNKNOWN_LAYOUT}"
            and not isinstance(row, LeftOut)
        ):
            found = read_row({**row, **STAND_INS}, HH_SEPARATOR, report, reading)
        readable += any(isinstance(one, PreferencePair) for one in found)
        for one in found:
            if isinstance(one, LeftOut):
                report.leave_out(one.reason, source, one.detail)
            else:
                prompts.setdefault(one.prompt)
        if limit is not None and len(prompts) >= limit:
            break
    require_kept(report, readable, f'"{spec}" (split "{split}")', reading.min_kept)
    report.add("distinct prompts", len(prompts))
    return list(prompts)[:limit], report


def _repeats_of_prompt(pair: PreferencePair) -> int:
    """Count the answers that are the last message of the prompt, or begin with it where that cannot be chance."""
    asked = pair.prompt[-1].content.strip() if pair.prompt else ""
    answers = [answer.strip() for answer in (pair.chosen, pair.rejected)]
    return sum(answer == asked or (len(asked) > 20 and answer.startswith(asked)) for answer in answers) if asked else 0


# ------------------------------------------------------------------------------------------------ judgement


def refuse_templates(report: Counters, where: str, reading: Reading) -> None:
    """Raise UserError where nearly all rows carry a chat template; a few are only counted."""
    templated = report[TEMPLATED]
    if templated < 2 or templated < NEARLY_ALL * report["rows"]:
        return
    if not reading.strip_template:
        raise UserError(
            f"{where}: {templated:,} of {report['rows']:,} rows carry a chat template already (<|im_end|>, [INST] and "
            "the like), and both models' own would come on top. --config.data.strip_template=True takes it off: "
            "rendered prompts become messages again, and answers lose the marker at their end."
        )


def require_kept(report: Counters, kept: int, where: str, min_kept: float) -> None:
    """Raise UserError, with the table of reasons, where nothing is left, or a smaller share than `min_kept`."""
    total = kept + sum(report.left_out.values())
    if kept and kept >= min_kept * total:
        return
    said = f"{where} holds no usable preference pair"
    if kept:
        said = f"{where}: only {kept:,} of {total:,} pairs can be used, fewer than config.data.min_kept={min_kept:g}"
    end = " Mend the rows, or lower it to go on without them." if kept else ""
    raise UserError(f"{said} ({report.reasons() or 'it is empty'}).{end}{advice(report)}")


def advice(report: Counters) -> str:
    """Say what to do about the reasons for which rows were left out."""
    parts = []
    if unknown := report.notes.get(UNKNOWN):
        parts.append(
            f"Fields that change neither prompt nor answer are declared with --config.data.ignore={','.join(unknown)}"
        )
    if report[f"left out: {UNKNOWN_LAYOUT}"]:
        parts.append(
            f"The columns found are {quoted(report.notes.get(SEEN, []))}; name those that hold the texts: "
            "--config.data.columns=prompt=NAME,chosen=NAME,rejected=NAME"
        )
    return "".join(f"\n{part}" for part in parts)


def overlap(train: Sequence[PreferencePair], test: Sequence[PreferencePair]) -> dict[str, float]:
    """Return which share of the test pairs is in the training data too, and of which share the prompt is."""
    ids = {pair.id.partition("-")[0] for pair in train}
    prompts = {pair.prompt for pair in train}
    return {
        "pairs": sum(pair.id.partition("-")[0] in ids for pair in test) / len(test),
        "prompts": sum(pair.prompt in prompts for pair in test if pair.prompt) / len(test),
    }


# ------------------------------------------------------------------------------------------------ sources


def _rows(spec: str, split: str, data_dir: str | os.PathLike[str] | None) -> Iterator[Located]:
    if spec.startswith("tfds:"):
        return _tfds_rows(spec, split, data_dir)
    if spec.startswith("hf:") and not is_url(spec):
        return _hub_rows(spec, split)
    return (row for path in _paths(spec, split) for row in _file_rows(path))


def _paths(spec: str, split: str) -> list[Path]:
    """Find the file, or the shards of a split in a folder."""
    # 1. A folder has one file or several shards of each split.
    path = at_hand(spec.replace("{split}", split))
    if path.is_dir():
        for ending in ENDINGS:
            for folder in (path, path / "data"):  # the hub keeps its shards in "data"
                whole, shards = folder / f"{split}{ending}", f"{split}-[0-9]*-of-*{ending}"
                if found := [whole] if whole.is_file() else sorted(folder.glob(shards)):
                    return found
        raise UserError(
            f'The folder "{path}" holds neither {split}.jsonl nor {split}.jsonl.gz nor another file or shards of the '
            f"split in a known format ({', '.join(ENDINGS)})."
        )
    # 2. A file is the split.
    if not path.is_file():
        raise UserError(
            f'There is no preference file "{path}"; give a .jsonl, .json, .csv or .parquet file, a folder of them, '
            '"tfds:name" or "hf:owner/name".'
        )
    if not path.name.endswith(ENDINGS):
        raise UserError(f'"{path}" is not a .jsonl file nor one of {", ".join(ENDINGS)}.')
    return [path]


def _file_rows(path: Path) -> Iterator[Located]:
    opened: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rb") as file, unpacked(path, file) as stream:
            for number, row in rows_of(path, stream):
                yield f"{path}:{number}", row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}:{number + 1}: the compressed file is damaged ({error}); fetch or make it again."
        ) from None
    except OSError as error:
        # Without a reason of the system it is the library that unpacks which has given up.
        if error.strerror is None:
            raise UserError(f"{path}:{number + 1}: the file is damaged ({error}); fetch or make it again.") from None
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _tfds_rows(spec: str, split: str, data_dir: str | os.PathLike[str] | None) -> Iterator[Located]:
    name = spec.removeprefix("tfds:")
    module, _, rest = name.partition(":")
    # 1. The library, and the module that registers the builder.
    try:
        import tensorflow_datasets as tfds

        if "." in module and "/" not in module and rest:
            importlib.import_module(module)
            name = rest
    except ImportError as error:
        raise UserError(f'"{spec}" cannot be read: {error}.') from None
    # 2. The data set: a prepared folder, or one that is prepared now if it is not there.
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


def _hub_rows(spec: str, split: str) -> Iterator[Located]:
    name, _, config = spec.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f'"{spec}" needs the package "datasets"; install ctpd-jax[hub].') from None
    try:
        for index, row in enumerate(load_dataset(name, config or None, split=split)):
            yield f"{spec}[{split}]:{index}", row
    except Exception as error:  # the hub's client raises a dozen kinds, from HTTP to a picture that cannot be decoded
        raise _cannot_open(f'The Hugging Face data set "{name}", split "{split}", cannot be read', error) from error


def _cannot_open(what: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    network = " Check the network." if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else ""
    return UserError(f"{what} ({reason}).{network}")
