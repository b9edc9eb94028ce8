"""The annotated data on disk: what each scorer measured, and the store that training reads.

1. `Column`: one scorer's float32 values per span, a file per shard of pairs. Each scorer measures what is missing.
2. `write_store`: pairs and columns merged into a TFDS data set of ArrayRecord shards with a manifest.
   `tfds.builder_from_directory(directory).as_data_source("train")` opens it, without TensorFlow.
3. `open_store`: random access to the pairs, after manifest and checksums have been held against what is expected.

The store holds what was measured; weights and the reference constant are computed when it is read.
Letters: S spans of a response, T tokens of one side of it, N pairs of a shard.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ctpd_jax import artifacts
from ctpd_jax.artifacts import local_path, opened, sha256_file
from ctpd_jax.errors import UserError
from ctpd_jax.schema import SIDES, Aligned, AlignedPair, TokenSide
from ctpd_jax.sharding import patiently

NAME = "ctpd_annotations"  # of the TFDS data set
SPLIT = "train"
TOGETHER = 1024  # records read at a time, by the threads of ArrayRecord
MANIFEST = "manifest.json"
_PROGRESS = "manifest.json.progress"
_FORMAT = 3
_OWN_FIELDS = ("format", "num_pairs", "shard_pairs", "scorers", "shards", "metadata", "written_with")
_ALIGNED = ("bounds", "teacher_ids", "teacher_span_ids", "student_ids", "student_span_ids")  # of each side, int32
_SCALARS = {"id", "weight", "margin", *(f"{side}_{what}" for side in SIDES for what in ("bytes", "truncated"))}
_INT32 = {"teacher_prompt", "student_prompt", *(f"{side}_{what}" for side in SIDES for what in _ALIGNED)}

Scores = dict[str, dict[str, np.ndarray]]  # side -> scorer -> float32 [S]: log-probability of each span
Record = dict[str, Any]


def shard_ranges(num_pairs: int, pairs_per_shard: int) -> list[range]:
    """The pairs of each shard: consecutive, `pairs_per_shard` in all but the last."""
    if pairs_per_shard < 1:
        raise UserError(f"pairs_per_shard is {pairs_per_shard}; it has to be at least 1.")
    return [range(start, min(start + pairs_per_shard, num_pairs)) for start in range(0, num_pairs, pairs_per_shard)]


# ---------------------------------------------------------------------------------------------- columns


class Column:
    """What one scorer measured: `<directory>/columns/<scorer>/<shard>.f32`, one file a shard, whole or not there.

    A shard is a list of float32 arrays of any lengths (by convention chosen, rejected, chosen, ...: two per pair).
    The file: SHA-256 of the rest (32 bytes), n, n+1 offsets (int64), the values (float32); all little-endian.
    `identity` says what was measured. Going on with another one is a UserError that names the first field that differs,
    unless `replace` allows to drop the old one. Several processes may write different shards; one of them is to `judge`
    the identity, as the others may still see what it replaced.
    """

    def __init__(
        self, directory: Path, scorer: str, identity: Mapping[str, Any], replace: bool = False, judge: bool = True
    ) -> None:
        # What was measured is judged once, and before the first shard is written.
        self.directory = local_path(directory) / "columns" / scorer
        path = self.directory / "identity.json"
        if judge and replace and artifacts.kept(path, identity) is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        advice, mend = "or annotate in another folder.", f"remove {self.directory} to measure it again"
        if judge and opened(path, identity, f"R{mend[1:]}, {advice}", mend) is None:
            if any(self.directory.glob("*.f32")):  # it was written before them
                raise artifacts.Broken(f"{path} is missing, so that nobody can say what lies beside it; {mend}.")
            artifacts.write_record(path, identity)

    def missing_shards(self, num_shards: int) -> list[int]:
        """Return the shards that are still to be measured: not there, or not as they were written."""
        return [shard for shard in range(num_shards) if self._load(shard) is None]

    def write(self, shard: int, arrays: Sequence[np.ndarray]) -> None:
        """Write one shard: `arrays` are float32 [S], of any S (also 0)."""
        for array in arrays:
            if np.ndim(array) != 1 or array.dtype != np.float32:
                raise ValueError(f"A column holds float32 [S] arrays, not {array.dtype}{list(np.shape(array))}.")
        offsets = np.cumsum([0, *map(len, arrays)], dtype="<i8")
        values = np.concatenate([np.zeros(0, "<f4"), *arrays])
        payload = np.array([len(arrays)], "<i8").tobytes() + offsets.tobytes() + values.tobytes()
        artifacts.write_bytes(self._path(shard), hashlib.sha256(payload).digest() + payload)

    def read(self, shard: int) -> list[np.ndarray]:
        """Return the arrays of one shard as they were written. Raises UserError if it is missing or damaged."""
        arrays = patiently(lambda: self._load(shard))
        if arrays is None:
            raise UserError(f"{self._path(shard)} is missing or damaged; annotate again, which measures only that.")
        return arrays

    def mapped(self, shard: int) -> list[np.ndarray]:
        """Return the arrays of one shard, left on disk until they are looked at; checked, and raises, as `read`."""
        stops = np.cumsum([len(array) for array in self.read(shard)])
        values = np.memmap(self._path(shard), "<f4", "r", offset=32 + 8 * (len(stops) + 2))
        return np.split(values, stops[:-1])

    def _path(self, shard: int) -> Path:
        return self.directory / f"{shard:05d}.f32"

    def _load(self, shard: int) -> list[np.ndarray] | None:
        path = self._path(shard)
        # A file that is not there, or not as it was written: both are measured again.
        data = path.read_bytes() if path.is_file() else b""
        payload = data[32:]
        if hashlib.sha256(payload).digest() != data[:32]:
            return None
        count = int(np.frombuffer(payload, "<i8", 1)[0])
        offsets = np.frombuffer(payload, "<i8", count + 1, offset=8)
        values = np.frombuffer(payload, "<f4", offset=8 * (count + 2))
        return [values[start:stop] for start, stop in itertools.pairwise(offsets)]


# ---------------------------------------------------------------------------------------------- records


def to_record(pair: AlignedPair, scores: Scores) -> Record:
    """Return a pair and its measurements as one flat record of the store.

    For each side: bounds int32 [S+1]; {teacher, student}_ids and _span_ids int32 [T]; one float32 [S] per scorer.
    Raises ValueError, naming the pair, where a score has another length than the spans.
    """
    record: Record = {"id": pair.id, "teacher_prompt": pair.teacher_prompt, "student_prompt": pair.student_prompt}
    record |= {"weight": pair.weight, "margin": np.nan if pair.margin is None else pair.margin}
    # Both alignments, and what every scorer measured of their spans.
    for index, side in enumerate(SIDES):
        aligned = pair.response(index)
        record[f"{side}_bytes"] = (pair.chosen_bytes, pair.rejected_bytes)[index]
        record[f"{side}_truncated"] = pair.truncated[index]
        record[f"{side}_bounds"] = aligned.bounds
        for model, tokens in (("teacher", aligned.teacher), ("student", aligned.student)):
            record[f"{side}_{model}_ids"] = tokens.ids
            record[f"{side}_{model}_span_ids"] = tokens.span_ids
        for scorer, values in scores[side].items():
            if np.shape(values) != (aligned.num_spans,):
                shape, spans = np.shape(values), aligned.num_spans
                raise ValueError(f"Pair {pair.id}: {scorer} of {side} has shape {shape}, but there are {spans} spans.")
            record[f"{side}_{scorer}"] = values
    return record


def from_record(record: Mapping[str, Any]) -> tuple[AlignedPair, Scores]:
    """Invert `to_record`, also for what TFDS gives back (the id as bytes). Its float32 fields are scores."""

    def aligned(side: str) -> Aligned:
        bounds, *tokens = (record[f"{side}_{what}"] for what in _ALIGNED)
        return Aligned(bounds, TokenSide(*tokens[:2]), TokenSide(*tokens[2:]))

    text = record["id"]
    pair = AlignedPair(
        id=text.decode() if isinstance(text, bytes) else str(text),
        teacher_prompt=record["teacher_prompt"],
        student_prompt=record["student_prompt"],
        chosen=aligned("chosen"),
        rejected=aligned("rejected"),
        chosen_bytes=int(record["chosen_bytes"]),
        rejected_bytes=int(record["rejected_bytes"]),
        truncated=(bool(record["chosen_truncated"]), bool(record["rejected_truncated"])),
        weight=float(record["weight"]),
        margin=None if np.isnan(record["margin"]) else float(record["margin"]),
    )
    # Nothing else in a record is float32.
    scores: Scores = {side: {} for side in SIDES}
    for name, value in record.items():
        if getattr(value, "dtype", None) == np.float32:
            side, scorer = name.split("_", 1)
            scores[side][scorer] = value
    return pair, scores


def _features(scorers: Sequence[str]) -> Any:
    """Return what TFDS has to know of a record's fields."""
    import tensorflow_datasets as tfds

    # Arrays as their bytes: number by number a record takes three times as long to write and to read.
    ints, floats = (
        tfds.features.Tensor(shape=(None,), dtype=dtype, encoding=tfds.features.Encoding.BYTES)
        for dtype in (np.int32, np.float32)
    )
    fields = {"id": tfds.features.Text(), "teacher_prompt": ints, "student_prompt": ints}
    fields |= dict.fromkeys(("weight", "margin"), tfds.features.Scalar(np.float64))
    for side in SIDES:
        fields[f"{side}_bytes"] = tfds.features.Scalar(np.int64)
        fields[f"{side}_truncated"] = tfds.features.Scalar(np.bool_)
        fields |= dict.fromkeys((f"{side}_{what}" for what in _ALIGNED), ints)
    for name in (f"{side}_{scorer}" for side in SIDES for scorer in scorers):
        if name in fields:
            raise UserError(f"A scorer cannot be called {name.split('_', 1)[1]!r}: the store has a field {name!r}.")
        fields[name] = floats
    return tfds.features.FeaturesDict(fields)


def serialized(record: Record) -> bytes:
    """Return a record as the tf.train.Example that TFDS makes of it by its features; TFDS is slower, and reads it."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name, value in record.items():
        field = example.features.feature[name]
        if isinstance(value, np.ndarray):
            field.bytes_list.value.append(value.tobytes())
        elif isinstance(value, str):
            field.bytes_list.value.append(value.encode("utf-8"))
        elif isinstance(value, float):
            field.float_list.value.append(value)
        else:
            field.int64_list.value.append(int(value))
    # Otherwise the order of a map changes with every process.
    return example.SerializeToString(deterministic=True)


def deserialized(data: bytes) -> Record:
    """Invert `serialized`: arrays int32 or float32, the id as bytes."""
    from tensorflow_datasets.proto import tf_example_pb2

    record: Record = {}
    for name, field in tf_example_pb2.Example.FromString(data).features.feature.items():
        if name in _SCALARS:
            (record[name],) = getattr(field, field.WhichOneof("kind")).value
        else:
            (value,) = field.bytes_list.value
            record[name] = np.frombuffer(value, np.int32 if name in _INT32 else np.float32)
    return record


# ---------------------------------------------------------------------------------------------- writing the store


def write_store(
    directory: Path,
    ranges: Sequence[range],
    records: Callable[[int, range], Iterable[Record]],
    scorers: Sequence[str],
    manifest: Mapping[str, Any],
) -> None:
    """Merge everything into `directory`, shard by shard, in the order of the pairs.

    `ranges` is `shard_ranges(...)`; `records(shard, pairs)` yields the records of one shard and is called only for
    shards that are not whole yet, so a run that was killed goes on where it stopped, to the same bytes. `manifest` is
    JSON: what the store was made from. A store in `directory` from another manifest is a UserError naming the field.
    """
    folder = local_path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    features = _features(scorers)
    if taken := [key for key in _OWN_FIELDS if key in manifest]:
        raise ValueError(f"A manifest cannot have a field {taken[0]!r}: the store writes one of that name itself.")
    shard_pairs = [len(pairs) for pairs in ranges]
    made_from = {**manifest, "format": _FORMAT, "num_pairs": sum(shard_pairs), "shard_pairs": shard_pairs}
    made_from["scorers"] = list(scorers)

    # 1. What is there already must have been made from the same; in an older form it is written anew.
    final, progress = folder / MANIFEST, folder / _PROGRESS
    advice = "Remove that folder to make it again, or choose another."
    for path in (final, progress):
        older = (artifacts.read_record(path) or made_from)["format"]
        if older < _FORMAT and opened(path, {**made_from, "format": older}, advice):
            path.unlink()
    if opened(final, made_from, advice) is not None:
        return
    begun = opened(progress, made_from, advice)
    done: list[dict[str, Any]] = begun["shards"] if begun else []

    # 2. The shards that are missing, or not as they were written; each is noted once it is whole.
    for shard, pairs in enumerate(ranges):
        path = folder / f"{NAME}-{SPLIT}.array_record-{shard:05d}-of-{len(ranges):05d}"
        if shard < len(done) and path.is_file() and sha256_file(path) == done[shard]["sha256"]:
            continue
        beside = path.with_name(path.name + artifacts.PARTIAL)
        num_bytes = _write_shard(beside, records(shard, pairs), len(pairs))
        entry = {"file": path.name, "bytes": num_bytes, "sha256": sha256_file(beside)}
        os.replace(beside, path)
        done[shard : shard + 1] = [entry]
        artifacts.write_record(progress, {**made_from, "shards": done})

    # 3. What makes the shards a data set, and the seal. A kill between them does no harm: without it nobody reads.
    _write_tfds_metadata(folder, features, shard_pairs, sum(entry["bytes"] for entry in done))
    metadata = artifacts.checksums(folder, ("dataset_info.json", "features.json"))
    written_with = {name: version(name) for name in ("ctpd-jax", "jax", "tensorflow-datasets")}  # told, not compared
    artifacts.write_record(final, {**made_from, "shards": done, "metadata": metadata, "written_with": written_with})
    progress.unlink(missing_ok=True)


def _write_shard(path: Path, records: Iterable[Record], expected: int) -> int:
    """Write a file whose bytes are a function of the records; return how many bytes these have, serialized."""
    from array_record.python import array_record_module

    # Groups of one record: training reads them in any order.
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    sizes = []
    try:
        for record in records:
            data = serialized(record)
            writer.write(data)
            sizes.append(len(data))
    finally:
        writer.close()
    if len(sizes) != expected:
        raise ValueError(f"{path.name} should hold {expected} records, but {len(sizes)} came.")
    return sum(sizes)


def _write_tfds_metadata(folder: Path, features: Any, shard_lengths: list[int], num_bytes: int) -> None:
    """Write dataset_info.json and features.json, which make the shards a TFDS data set."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=shard_lengths, num_bytes=num_bytes, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[split],
        check_data=False,  # the check would need TensorFlow
        description="Preference pairs with the span log-probabilities that each scorer measured, in their order.",
        disable_shuffling=True,
    )


# ---------------------------------------------------------------------------------------------- reading the store


@dataclass(frozen=True)
class Store:
    """The pairs of a store, in their order: a random access source (`len`, `[i]`) that can be pickled."""

    manifest: dict[str, Any]
    records: Any  # the TFDS data source of serialized records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[AlignedPair, Scores]:
        return from_record(deserialized(self.records[range(len(self))[index]]))  # the range refuses an index outside

    def __iter__(self) -> Iterator[tuple[AlignedPair, Scores]]:
        for first in range(0, len(self), TOGETHER):
            for data in self.records.__getitems__(range(first, min(first + TOGETHER, len(self)))):
                yield from_record(deserialized(data))


def open_store(
    directory: str | Path, expect: Mapping[str, Any] | None = None, verify: bool = True, made_by: str = "annotate"
) -> Store:
    """Open what `write_store` finished.

    `expect` are fields (nested dicts too) that the manifest must have with these values; others may be there as well.
    `verify` reads every shard once and holds it against its SHA-256. Raises UserError: no finished store there, the
    first field that differs with both values, or the file whose bytes are not those that were written. `made_by` is the
    command that makes such a store.
    """
    import tensorflow_datasets as tfds

    folder = local_path(directory)
    path, expected = folder / MANIFEST, {"format": _FORMAT, **(expect or {})}
    # 1. A finished store, made from what is expected.
    manifest = patiently(lambda: opened(path, expected, "Annotate again with these settings."))
    if manifest is None:
        state = "an unfinished" if (folder / _PROGRESS).exists() else "no"
        raise UserError(f"There is {state} annotated store at {folder}; run `ctpd {made_by}` first.")
    # 2. Its files, as they were written.
    files = {entry["file"]: entry["sha256"] for entry in manifest["shards"]} | manifest["metadata"]
    patiently(lambda: all((folder / name).is_file() for name in files) or None)
    try:
        artifacts.check_files(folder, files, read=verify)
        artifacts.check_files(folder, manifest["metadata"])
    except artifacts.Broken as reason:
        raise UserError(f"{reason}; remove {path} and annotate again to restore it.") from None
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return Store(manifest, tfds.builder_from_directory(folder).as_data_source(SPLIT, deserialize_method=raw))
