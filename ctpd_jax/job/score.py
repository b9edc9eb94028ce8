"""Models of a job read its pairs: span log-probabilities, shard by shard; what is there already is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ctpd_jax.annotate.scorer import Scorer, plain_item, score_pairs
from ctpd_jax.annotate.store import Column, shard_ranges
from ctpd_jax.artifacts import read_record, write_record
from ctpd_jax.data.loader import padding, plan_shapes
from ctpd_jax.data.packing import in_words
from ctpd_jax.data.rows import PairItem
from ctpd_jax.errors import UserError
from ctpd_jax.job import lineage
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of, dtype_of, text_of
from ctpd_jax.job.pairs import PROPOSALS, Pairs, Split, proposed
from ctpd_jax.job.recipe import packing, reading
from ctpd_jax.job.table import base_dtype, columns, starts_from, trained_model
from ctpd_jax.processes import preempt
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair, Array, Batch, Model
from ctpd_jax.sharding import barrier, first_process, on_host, place_batch, place_rows, told_by_first
from ctpd_jax.text.prepare import steered_prompt
from ctpd_jax.train.loop import compiled_programs, require_shapes
from ctpd_jax.train.metrics import Progress

# What was measured of a split lies there, in the workdir.
HOMES: dict[Split, str] = {
    "train": "annotations",
    "test": "evaluation",
    "answers": f"{PROPOSALS}/ranking",
    "proposed": PROPOSALS,
}

Measured = list[tuple[np.ndarray, np.ndarray]]  # per pair: span log-probabilities of chosen and rejected, float32 [S]


def score(
    job: Job,
    pairs: Pairs,
    stages: Mapping[str, str],
    dtype: str,
    instruction: str | None = None,
    by_token: bool = False,
) -> dict[str, Measured]:
    """Has the models that stages left read a split, in one pass.

    Args:
        stages: column -> stage; several only as adapters of one shape over one base.
        dtype: of their parameters.
        instruction: put before every prompt.
        by_token: the log-probability of every token of theirs, rather than of every span.

    Returns:
        What each column holds. Shards that are on disk already, measured by the same models, are not read again.
    """

    def columns_of() -> dict[str, Column]:
        return {one: _column(job, pairs, one, stage, dtype, instruction, by_token) for one, stage in stages.items()}

    def measure(found: Mapping[str, Column], ranges: Sequence[range], missing: Sequence[int]) -> None:
        _measure(job, pairs, stages, dtype, instruction, by_token, found, ranges, missing)

    return filled(job, pairs, columns_of, measure, reads_together(job))


def filled(
    job: Job,
    pairs: Pairs,
    columns_of: Callable[[], dict[str, Column]],
    measure: Callable[[Mapping[str, Column], Sequence[range], Sequence[int]], None],
    together: bool = False,
) -> dict[str, Measured]:
    """What columns hold of a split: each process has `measure`(columns, pairs of every shard, shards) fill its share.

    With `together` a share is everything: all processes do the same, and the first one writes.

    Shards that are on disk already, measured by the same models, are left as they are.
    """

    # 1. What is missing. One process says so: each from its own view of a shared folder could leave a shard to nobody.
    def look() -> tuple[int, list[int]]:
        size = shard_size(job, pairs.split)
        shards = len(shard_ranges(len(pairs.aligned), size))
        missing: set[int] = set()
        for column in columns_of().values():
            missing.update(column.missing_shards(shards))
        return size, sorted(missing)

    size, missing = told_by_first(look)
    ranges, found = shard_ranges(len(pairs.aligned), size), columns_of()

    # 2. Each process reads its share; what one that died has left undone is missing again for those that come after.
    done = f"{pairs.split}/{'+'.join(found)} is measured"
    if together:
        if missing:
            measure(found, ranges, missing)
        barrier(done)
    else:
        missing = missing[jax.process_index() :: jax.process_count()]
        with preempt.apart(done):
            if missing:
                measure(found, ranges, missing)

    # 3. Everything that was measured, from disk.
    measured = {}
    for one, column in found.items():
        values = [array for shard in range(len(ranges)) for array in column.read(shard)]
        measured[one] = list(zip(values[::2], values[1::2], strict=True))
    return measured


def training_data(job: Job, stage: str) -> tuple[Job, Path]:
    """The job whose data a CTPD stage learns from, and the folder of the store of them."""
    if stage == "student_proposed":
        return proposed(job), job.workdir / HOMES["proposed"]
    return job, job.workdir / HOMES["train"]


def reference_of(job: Job, pairs: Pairs, stage: str) -> Measured:
    """What a stage's own start makes of the pairs: the same numbers that its policy begins with."""
    sft, dtype = starts_from(job.config, stage), base_dtype(job.config, stage)
    name = "reference" if sft == "teacher_sft" else "start"
    if dtype != columns(job.config)[name].dtype:  # the annotations' column of that name is of another start
        name = f"{name}_{dtype}"
    return score(job, pairs, {name: sft}, dtype)[name]


def shard_size(job: Job, split: Split) -> int:
    """Pairs of a shard, as they were when the first one was begun: another setting would move every boundary."""
    # Columns of before are cut at the old boundaries, and a new one must be cut there too.
    path, wanted = job.workdir / HOMES[split] / "shards.json", job.config.annotate.pairs_per_shard
    if (known := read_record(path)) is None:
        known = {"pairs_per_shard": wanted}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, known)
    if known["pairs_per_shard"] != wanted:
        size = known["pairs_per_shard"]
        job.say(f"{path.parent} keeps its shards of {size} pairs; annotate.pairs_per_shard is {wanted} now.")
    return known["pairs_per_shard"]


def _column(
    job: Job, pairs: Pairs, name: str, stage: str, dtype: str, instruction: str | None, by_token: bool = False
) -> Column:
    identity = {
        "params": lineage.identity(job, stage),
        "model": trained_model(job.config, stage),
        "weights": dtype,
        "instruction": instruction,
        "data": pairs.identity,
        "compute": dtype_of(job.config, job.mesh),
        **({"of": "tokens"} if by_token else {}),
    }
    return column_of(job, pairs, name, identity)


def column_of(job: Job, pairs: Pairs, name: str, identity: Mapping[str, Any]) -> Column:
    """A column of a split, as it lies in the workdir."""
    # Held-out scores are cheap and follow whatever was trained last; annotations are not thrown away unasked.
    return Column(job.workdir / HOMES[pairs.split], name, identity, pairs.split == "test", first_process())


def _measure(
    job: Job,
    pairs: Pairs,
    stages: Mapping[str, str],
    dtype: str,
    instruction: str | None,
    by_token: bool,
    found: Mapping[str, Column],
    ranges: Sequence[range],
    missing: Sequence[int],
) -> None:
    """Reads the missing shards into their columns, on the devices that read."""
    what, model = "+".join(stages), trained_model(job.config, next(iter(stages.values())))
    name = f"{HOMES[pairs.split]}/{what}"

    # 1. The model's view of the pairs, in rows of a few shapes.
    items, spans = items_of(job, pairs, model, instruction), spans_of(pairs.aligned, model, by_token)
    rows = packing(job.config, reading_mesh(job), decoder_of(job, model), reads=True)
    micro_batch = job.config.annotate.micro_batch
    shapes = plan_shapes(items, ranges, micro_batch, rows)
    job.say(f"{name}: {in_words(padding(items, ranges[:16], micro_batch, rows, shapes))}")

    # 2. The models.
    scorer, program = reader(job, tuple(stages.values()), dtype)

    # 3. Shard by shard: read, checked, written.
    done = len(pairs.aligned) - sum(len(ranges[shard]) for shard in missing)
    job.log.rewind(name, missing[0] - 1)
    with Progress(len(pairs.aligned), f"{pairs.split}/{what}", done, unit="pair") as progress:
        for shard in missing:
            places = ranges[shard]
            part = [items[i] for i in places], [spans[i] for i in places]
            scores = score_pairs(scorer, *part, micro_batch, rows, shapes, progress.update)
            # The line comes before the files: a process killed between them leaves a shard that is missing, which
            # is told anew, and never one that nobody told.
            for one, own in zip(found, scores, strict=True):
                _check_finite(job, one, stages[one], pairs.aligned, places, own)
            compiled = compiled_programs(name, program, len(shapes))
            job.log.log(name, shard, {"pairs": len(places), "compiled_programs": compiled})
            for column, own in zip(found.values(), scores, strict=True):
                if reads_together(job) and not first_process():
                    continue
                column.write(shard, [values for both in own for values in both])


def reader(job: Job, stages: tuple[str, ...], dtype: str) -> tuple[Scorer, Any]:
    """The models that stages left, on the devices that read and ready for it, and the jitted program in it."""
    # Shapes first: what is loaded is held against what the plan said.
    mesh = reading_mesh(job)
    what = reading(job.config, stages, dtype, decoder_of(job, trained_model(job.config, stages[0])), mesh)
    origin, adapters = lineage.finished(lineage.Files(job, mesh), job.config, stages, dtype)
    base, name = origin.params, "+".join(stages)
    require_shapes(name, what.base, base)
    require_shapes(name, what.adapters, adapters)
    program = what.program()

    def scorer(batch: Batch, slot_spans: Array) -> Array:
        # Before every batch: a shard of a large teacher takes longer than the grace of a preemption.
        kept = "the shards that are written are kept"
        if reads_together(job) and preempt.stop_now():
            raise preempt.Preempted(kept)
        preempt.check(kept)
        return on_host(program(adapters, base, place_batch(mesh, batch), place_rows(mesh, slot_spans)))

    return scorer, program


def reading_mesh(job: Job) -> Mesh:
    """The devices that a model is cut over where it reads pairs: those of a process, or all of them."""
    return job.mesh if job.config.annotate.devices == "all" else job.own


def reads_together(job: Job) -> bool:
    """Whether all processes read the same pairs at once, with one copy of the model."""
    return job.config.annotate.devices == "all" and jax.process_count() > 1


def items_of(job: Job, pairs: Pairs, model: Model, instruction: str | None = None) -> list[PairItem]:
    """One model's view of every pair; with an instruction, behind it."""
    prompt = prompts_of(job, pairs, model, instruction)
    return [plain_item(pair, model, prompt(pair)) for pair in pairs.aligned]


def prompts_of(
    job: Job, pairs: Pairs, model: Model, instruction: str | None
) -> Callable[[AlignedPair], np.ndarray | None]:
    """A pair -> the token ids int32 [P] that a model reads before the responses; None: the pair's own, without one."""
    if instruction is None:
        return lambda pair: None
    text, steered = text_of(job, model), partial(steered_prompt, instruction=instruction)
    return lambda pair: text.prompt(steered(pairs.raw[pair.id], pair.dropped))


def spans_of(pairs: Sequence[AlignedPair], model: Model, by_token: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """The span ids of every pair's chosen and rejected tokens, int32 [T] each; by token, each is a span of its own."""
    if by_token:
        ids = [[len(pair.tokens(model, side).ids) for side in (CHOSEN, REJECTED)] for pair in pairs]
        return [(np.arange(chosen, dtype=np.int32), np.arange(rejected, dtype=np.int32)) for chosen, rejected in ids]
    return [(pair.tokens(model, CHOSEN).span_ids, pair.tokens(model, REJECTED).span_ids) for pair in pairs]


def _check_finite(
    job: Job, name: str, stage: str, pairs: Sequence[AlignedPair], places: Sequence[int], scores: Measured
) -> None:
    for place, both in zip(places, scores):
        if not all(np.isfinite(values).all() for values in both):
            raise UserError(
                f"{name}: a log-probability of pair {pairs[place].id} is not finite. Look at the model in "
                f"{job.workdir / stage}; a training that diverged wants a lower config.{stage}.lr."
            )
