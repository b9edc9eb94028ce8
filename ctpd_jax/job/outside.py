"""A teacher that is elsewhere: a server measures its columns, or a table has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ctpd_jax.annotate.outside import Table, asked_logps, summed
from ctpd_jax.annotate.store import Column
from ctpd_jax.artifacts import sha256_file
from ctpd_jax.errors import UserError
from ctpd_jax.job import table
from ctpd_jax.job.job import Job
from ctpd_jax.job.pairs import Pairs
from ctpd_jax.job.score import HOMES, Measured, column_of, filled, prompts_of
from ctpd_jax.processes import preempt, server
from ctpd_jax.schema import SIDES, AlignedPair
from ctpd_jax.sharding import first_process
from ctpd_jax.train.metrics import Progress

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
                    preempt.check("the shards that are written are kept")
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
        read = table_of(job)
        yield lambda some: (read.logps(pair, name, prompt(pair)) for pair in some)
        return
    # 2. What a server tells, of both responses of several pairs at once.
    model = column.outside.removeprefix("endpoint: ")

    def ask(session: Any, pair: AlignedPair) -> tuple[np.ndarray, np.ndarray]:
        own, found = prompt(pair), []
        for side, what in enumerate(SIDES):
            tokens = pair.tokens("teacher", side)
            read = pair.teacher_prompt if own is None else own
            values = asked_logps(session, annotate.endpoint, model, read, tokens.ids)
            found.append(summed(f"{model}: the {what} response of pair {pair.id}", values, tokens.span_ids))
        return found[0], found[1]

    with server.opened(annotate.parallel) as session:
        workers = ThreadPoolExecutor(annotate.parallel)
        try:
            yield lambda some: workers.map(partial(ask, session), some)
        finally:  # what ends one question ends those that wait
            workers.shutdown(cancel_futures=True)


def identity_of(job: Job, column: table.Column) -> str:
    """What identifies who measured a column elsewhere: the model's name on its server, or the bytes of the table."""
    return f"table: {table_digest(job)}" if column.outside == "table" else column.outside


@lru_cache(maxsize=2)
def table_of(job: Job) -> Table:
    names = [name for name, column in table.columns(job.config).items() if column.outside]
    return Table(job.config.annotate.table, names)


@lru_cache(maxsize=2)
def table_digest(job: Job) -> str:
    path = table_of(job).path
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    return " ".join(map(sha256_file, files))


def check_outside(job: Job) -> None:
    """Meets a table that lacks a column, or a server that lacks a model, before anything was trained.

    Raises:
        UserError: either.
    """
    # A table is opened and looks at its columns; what it says of each pair is compared where that is read.
    if job.config.annotate.table:
        table_of(job)
    # Of a server its models: any process would hear the same.
    url = job.config.annotate.endpoint
    if not url or not first_process():
        return
    with server.opened(1) as session:
        listed = server.asked(session, url, "models")
    try:
        there = [str(one["id"]) for one in listed["data"]]
    except (KeyError, TypeError):
        raise UserError(
            f"{url}/models lists no models; the address of a server in OpenAI's form ends with /v1."
        ) from None
    for name, column in table.columns(job.config).items():
        model = column.outside.removeprefix("endpoint: ")
        if model and model not in there:
            raise UserError(f"config.annotate.served.{name} is {model!r}; {url} has {', '.join(there) or 'none'}.")
