"""A teacher that is elsewhere: a server measures its columns, or a table has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from ctpd_jax.annotate.outside import Table, asked_logps, summed
from ctpd_jax.annotate.store import Column
from ctpd_jax.artifacts import sha256_file
from ctpd_jax.errors import UserError, printable
from ctpd_jax.job import table
from ctpd_jax.job.job import Job
from ctpd_jax.job.pairs import Pairs, load_pairs
from ctpd_jax.job.score import HOMES, Measured, column_of, filled, prompts_of
from ctpd_jax.job.status import SEALS
from ctpd_jax.processes import preempt, server
from ctpd_jax.schema import SIDES, AlignedPair
from ctpd_jax.sharding import first_process
from ctpd_jax.train.metrics import Progress

KEPT = "the shards that are written are kept"
Measure = Callable[[AlignedPair], tuple[np.ndarray, np.ndarray]]  # a pair -> float32 [S] of chosen and rejected


def score_outside(job: Job, pairs: Pairs, name: str, column: table.Column) -> dict[str, Measured]:
    """Has a split measured elsewhere; the shards that are on disk already are not asked for again."""
    prompt = prompts_of(job, pairs, "teacher", column.instruction)
    identity = {"outside": identity_of(job, column), "instruction": column.instruction, "data": pairs.identity}

    def measure(found: Mapping[str, Column], ranges: Sequence[range], missing: Sequence[int]) -> None:
        # A line a shard, as where a model reads here.
        log, known = f"{HOMES[pairs.split]}/{name}", len(pairs.aligned) - sum(len(ranges[shard]) for shard in missing)
        job.log.rewind(log, missing[0] - 1)
        with (
            measuring(job, name, column, prompt) as every,
            Progress(len(pairs.aligned), f"{pairs.split}/{name}", known, unit="pair") as progress,
        ):
            # A shard is on disk before the next is asked for: what a server that died has answered is not lost.
            for shard in missing:
                arrays: list[np.ndarray] = []
                for both in every([pairs.aligned[i] for i in ranges[shard]]):
                    preempt.check(KEPT)
                    arrays += both
                    progress.update()
                # The line first: a shard on disk is one that was told.
                job.log.log(log, shard, {"pairs": len(ranges[shard])})
                found[name].write(shard, arrays)

    return filled(job, pairs, lambda: {name: column_of(job, pairs, name, identity)}, measure)


@contextmanager
def measuring(
    job: Job, name: str, column: table.Column, prompt: Callable[[AlignedPair], np.ndarray | None]
) -> Iterator[Callable[[Sequence[AlignedPair]], Iterator[tuple[np.ndarray, np.ndarray]]]]:
    """What measures pairs, in their order; by a server several at once."""
    # 1. What a table has.
    annotate = job.config.annotate
    if annotate.table:
        read = Table(annotate.table, [name])
        yield lambda some: (read.logps(pair, name, prompt(pair)) for pair in some)
        return
    # 2. What a server tells, of both responses of several pairs at once.
    model = model_of(column)

    def ask(pair: AlignedPair) -> tuple[np.ndarray, np.ndarray]:
        own, found = prompt(pair), []
        for side, name in enumerate(SIDES):
            tokens, what = pair.tokens("teacher", side), f"{model}, the {name} response of pair {pair.id}"
            read = pair.teacher_prompt if own is None else own
            try:
                values = asked_logps(session, annotate.endpoint, model, read, tokens.ids)
            except UserError as error:
                raise UserError(f"{what}: {error}") from None
            found.append(summed(what, values, tokens.span_ids))
        return found[0], found[1]

    with server.opened(annotate.parallel) as session:
        yield lambda some: server.in_order(ask, some, annotate.parallel, KEPT)


def identity_of(job: Job, column: table.Column) -> str:
    """What identifies who measured a column elsewhere: the model's name on its server, or the bytes of the table."""
    return f"table: {table_digest(job)}" if column.outside == "table" else column.outside


@lru_cache(maxsize=2)
def table_digest(job: Job) -> str:
    """SHA-256 of the table's files."""
    return " ".join(sha256_file(Path(file)) for file in sorted(Table(job.config.annotate.table, []).source.files))


def check_outside(job: Job, command: str) -> None:
    """Meets a table that lacks something, or a server that lacks a model, before anything was trained.

    Raises:
        UserError: either.
    """
    config, outside = job.config, {name: one for name, one in table.columns(job.config).items() if one.outside}
    if not outside:
        return
    with preempt.apart("the teacher that is elsewhere is there"):
        if not first_process():  # any process would hear the same
            return
        # 1. A table's columns. A server's models, and only where it is needed still.
        if config.annotate.table:
            Table(config.annotate.table, list(outside))
        elif all_measured(job, command):
            return
        else:
            check_served(config.annotate.endpoint, {name: model_of(column) for name, column in outside.items()})
        # 2. Before hours of training: a table has every pair, a server tells of the longest one.
        if command != "run" or (job.workdir / SEALS["annotate"]).exists():
            return
        pairs = load_pairs(job, "train")
        for name, column in outside.items():
            prompt = prompts_of(job, pairs, "teacher", column.instruction)
            some = pairs.aligned if config.annotate.table else [max(pairs.aligned, key=length)]
            with measuring(job, name, column, prompt) as every:
                for _ in every(some):
                    preempt.check("nothing was begun")


def all_measured(job: Job, command: str) -> bool:
    """Whether the stages of a command that ask a teacher are finished: a server may be gone by then."""
    stages = [one for one in ("annotate", "propose") if command in ("run", one) and not table.left_out(job.config, one)]
    return all((job.workdir / SEALS[stage]).exists() for stage in stages)


def check_served(url: str, models: Mapping[str, str]) -> None:
    """Refuses names of models (column -> name) that a server has not."""
    # In a thread as all questions are, so that a silent server can be left.
    with server.opened(1) as session:
        (listed,) = server.in_order(lambda path: server.asked(session, url, path), ["models"], 1, "nothing was begun")
    try:
        there = [str(one["id"]) for one in listed["data"]]
    except (KeyError, TypeError):
        raise UserError(
            f"{url}/models lists no models; the address of a server in OpenAI's form ends with /v1."
        ) from None
    for name, model in models.items():
        if model not in there:
            raise UserError(
                f"config.annotate.served.{name} is {model!r}; {url} has {printable(', '.join(there))[:500] or 'none'}."
            )


def model_of(column: table.Column) -> str:
    """The name on the server of the model that measures a column."""
    return column.outside.removeprefix("endpoint: ")


def length(pair: AlignedPair) -> int:
    """How many tokens a teacher reads of a pair's longer side."""
    return len(pair.teacher_prompt) + max(len(pair.tokens("teacher", side).ids) for side in range(len(SIDES)))
