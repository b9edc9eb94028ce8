"""Annotation: reference, contrastive pair and the student's start read the training pairs once, and the store keeps it.

The store's manifest says what it was made from. Training compares it with what it can know without the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ctpd_jax.annotate.scorer import score_pairs
from ctpd_jax.annotate.store import shard_ranges, to_record, write_store
from ctpd_jax.artifacts import kept, sha256_file, write_record
from ctpd_jax.buckets.objects import at_hand
from ctpd_jax.data.loader import plan_shapes
from ctpd_jax.job.job import Job, by_first, result
from ctpd_jax.job.lineage import identity
from ctpd_jax.job.models import decoder_of, dtype_of, text_digest, weights_digest
from ctpd_jax.job.outside import identity_of, score_outside
from ctpd_jax.job.pairs import Pairs, load_pairs
from ctpd_jax.job.recipe import packing, passes
from ctpd_jax.job.score import (
    HOMES,
    Measured,
    items_of,
    reader,
    reading_mesh,
    reads_together,
    score,
    shard_size,
    spans_of,
)
from ctpd_jax.job.table import Column, columns, left_out, models_here
from ctpd_jax.processes import preempt
from ctpd_jax.schema import SIDES
from ctpd_jax.sharding import first_process, told_by_first
from ctpd_jax.text.prepare import RULES


def run(job: Job, stage: str) -> None:
    config = job.config
    pairs = load_pairs(job, "train")

    # 1. Does rounding leave anything of the weights? Before hours of reading, on a few pairs.
    if reads_together(job):
        compare_rounded(job, pairs)
    else:
        by_first("the first pairs are compared", lambda: compare_rounded(job, pairs))

    # 2. Every column.
    measured = measure(job, pairs, columns(config))

    # 3. The store: pairs and columns in one place, in the order of the pairs.
    by_first("the store is written", lambda: write(job, pairs, measured))


def measure(job: Job, pairs: Pairs, asked: Mapping[str, Column]) -> dict[str, Measured]:
    """Has some columns of the annotations measured, elsewhere or here, adapters over one base in one pass."""
    decoders = {c.model: decoder_of(job, c.model) for c in columns(job.config).values() if not c.outside}
    measured: dict[str, Measured] = {}
    for name, column in asked.items():
        if column.outside:
            measured |= score_outside(job, pairs, name, column)
    for together in passes(job.config, decoders):
        if stages := {name: asked[name].stage for name in together if name in asked}:
            first = asked[next(iter(stages))]
            measured |= score(job, pairs, stages, first.dtype, first.instruction)
    return {name: measured[name] for name in asked}


def write(job: Job, pairs: Pairs, measured: Mapping[str, Measured]) -> None:
    """What every model made of pairs to train on -> their store."""

    def record(i: int) -> dict:
        scores = {SIDES[side]: {name: column[i][side] for name, column in measured.items()} for side in range(2)}
        return to_record(pairs.aligned[i], scores)

    def records(shard: int, part: range) -> Iterator[dict]:
        preempt.check(f"everything is measured, {shard} shards of the store are written")
        return map(record, part)

    folder = job.workdir / HOMES[pairs.split]
    ranges = shard_ranges(len(pairs.aligned), shard_size(job, pairs.split))
    write_store(folder, ranges, records, list(measured), manifest(job, pairs))
    job.say(f"annotate: {len(pairs.aligned)} pairs in {folder}, measured by {', '.join(measured)}.")


# ------------------------------------------------------------------------------------------------ what it is made from


def manifest(job: Job, pairs: Pairs) -> dict[str, Any]:
    """What the annotations were made from: what was measured, by digest, and what asked for it."""
    config = job.config
    asked = columns(config)
    data = ("limit", "columns", "ignore", "ranked", "strip_template", *pairs.identity)
    return {
        "settings": {
            "data": _data_settings(config, data),
            "scorers": _scorers(asked),
            "weights_source": config.weights.source,
        },
        "source": source_of(config),
        "compute": dtype_of(config, job.mesh),
        "student": _student(job),
        "data": pairs.identity,
        "measured_by": {
            name: identity_of(job, column) if column.outside else identity(job, column.stage)
            for name, column in asked.items()
        },
    } | teacher_identity(job)


def known_without_teacher(job: Job, stored: Mapping) -> dict[str, Any]:
    """The part of the manifest that training can check with the student and the config alone, given the stored one.

    Settings are compared where nothing measured is at hand; of a model that is, its digest. What needs no contrastive
    pair takes a store that has one.
    """
    config, asked = job.config, columns(job.config)
    settings: dict[str, Any] = {
        "data": _data_settings(config, stored.get("settings", {}).get("data", ())),
        "scorers": _scorers(asked),
    }
    if config.weights.source not in ("uniform", "random"):
        settings["weights_source"] = config.weights.source
    # The same DPO model, and its reverse besides.
    if config.weights.source == "dpo_reference" and stored.get("settings", {}).get("weights_source") == "dpo":
        settings["weights_source"] = "dpo"
    # Of a model whose stage is in this workdir, or that is the user's own student, the digest is known; of a table that
    # is there still, too.
    known = {}
    for name, column in asked.items():
        student = column.model == "student"
        if column.outside:
            if not config.annotate.table or Path(config.annotate.table).expanduser().exists():
                known[name] = identity_of(job, column)
        elif student if left_out(config, column.stage) else result(job, column.stage) is not None:
            known[name] = identity(job, column.stage)
    return {
        "settings": settings,
        "source": same_source(config, stored.get("source", {})),
        "compute": dtype_of(config, job.mesh),
        "student": _student(job),
        "data": {"rules": RULES},  # spans that this version would cut otherwise are not trained on
        "measured_by": known,
    }


def teacher_identity(job: Job) -> dict[str, Any]:
    """The teacher's part of the manifest: checked wherever the teacher's folder can be read."""
    weights = {"weights": weights_digest(job, "teacher")} if "teacher" in models_here(job.config) else {}
    return {"teacher": text_digest(job, "teacher") | weights}


def teacher_is_here(config: ConfigDict) -> bool:
    return bool(config.teacher.path) and Path(config.teacher.path).expanduser().is_dir()


def compared(manifest: Mapping) -> dict[str, Any]:
    """What of a store's manifest decides its numbers beyond rounding: the versions and the shards do not."""
    told = ("written_with", "shards", "shard_pairs", "metadata")
    return {name: value for name, value in manifest.items() if name not in told}


def source_of(config: ConfigDict) -> dict[str, Any]:
    """Where the training pairs come from; of a file that is there, also its SHA-256."""
    found, path = {"train": config.data.train, "split": config.data.train_split}, at_hand(config.data.train)
    return found | {"sha256": sha256_file(path)} if path.is_file() else found


def same_source(config: ConfigDict, stored: Mapping) -> dict[str, Any]:
    """What the manifest has to say of the data: of a file its bytes, wherever it lies, else its name."""
    found = source_of(config)
    if "sha256" in found and "sha256" in stored:
        return {"sha256": found["sha256"]} if found["sha256"] == stored["sha256"] else found
    return {name: value for name, value in found.items() if name != "sha256"}


def _student(job: Job) -> dict[str, Any]:
    return text_digest(job, "student") | {"start": identity(job, "student_sft")}


def _data_settings(config: ConfigDict, names: Iterable[str]) -> dict[str, Any]:
    """The settings of the data that decide its pairs, among `names`."""
    return {name: value for name, value in config.data.to_dict().items() if name in names}


def _scorers(asked: Mapping[str, Column]) -> dict[str, Any]:
    """Of every column, what was asked of the model that measured it."""
    return {
        name: {"tokens": column.model, "instruction": column.instruction, "weights": column.dtype or column.outside}
        for name, column in asked.items()
    }


# ------------------------------------------------------------------------------------------------ rounding


def compare_rounded(job: Job, pairs: Pairs) -> None:
    """Reads the first pairs with the contrastive pair as it was trained and as it will be read, and tells what is left.

    Adapters stay what they are over a rounded base. A pair that was trained whole is rounded itself: where training
    moved it by less than that, log pi+ - log pi- is mostly the rounding.
    """
    # 1. Which of the two are rounded at all, and was that looked at before?
    config, path = job.config, job.workdir / "annotations" / "rounded.json"
    both = {name: column for name, column in columns(config).items() if name in ("positive", "negative")}
    rounded = {
        name: column
        for name, column in both.items()
        if not column.outside
        and not column.stage.endswith("_sft")
        and not config[column.stage].lora.rank
        and column.dtype != "float32"
    }
    count = config.annotate.compared_pairs
    measured = {"pairs": count, **{name: identity(job, c.stage) for name, c in rounded.items()}}
    look = partial(kept, path, {"measured": measured})
    if not rounded or not count or (told_by_first(look) if reads_together(job) else look()):
        return

    # 2. The first pairs in float32 and as they will be read, one model after the other: two may not fit.
    ratios, places = [], range(min(count, len(pairs.aligned)))
    rows, micro_batch = packing(config, reading_mesh(job), None), config.annotate.micro_batch
    for wide in (True, False):
        sums: list[np.ndarray] = []
        for column in both.values():
            items = items_of(job, pairs, column.model)[: len(places)]
            spans = spans_of(pairs.aligned[: len(places)], column.model)
            scorer, _ = reader(job, (column.stage,), "float32" if wide else column.dtype)
            shapes = plan_shapes(items, [places], micro_batch, rows)
            (found,) = score_pairs(scorer, items, spans, micro_batch, rows, shapes)
            sums.append(np.concatenate([values for sides in found for values in sides]))
            del scorer  # and its model
        ratios.append(sums[0] - sums[1])

    # 3. Where rounding leaves nothing the ratio is flat, and has no correlation with anything.
    flat = any(np.ptp(ratio) == 0 for ratio in ratios)
    correlation = 0.0 if flat else float(np.corrcoef(ratios)[0, 1])
    if first_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, {"measured": measured, "correlation": correlation})
    job.say(
        f"The contrastive pair in bfloat16: over {len(places)} pairs log pi+ - log pi- correlates "
        f"{correlation:.3f} with that of float32."
        + (" Most of it is rounding: set annotate.teacher_weights=float32." if not correlation > 0.9 else "")
    )
