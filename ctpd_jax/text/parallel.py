"""Pairs prepared by several processes of this machine: much of the work is Python, which takes one core alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import NamedTuple

from ctpd_jax.schema import PreferencePair
from ctpd_jax.text.prepare import BATCH, Limits, Part, gathered, parts_of, prepare_part
from ctpd_jax.text.prompts import TextModel, load_text_model

MOST = 16  # processes; each holds both tokenizers


class Source(NamedTuple):
    """Where a process finds a text model; the arguments of `load_text_model`."""

    path: str
    template: str
    template_variables: str


def workers_for(pairs: int) -> int:
    """Return how many processes are worth their start, which takes seconds, for so many pairs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST, pairs // (4 * BATCH))


def prepare_in_processes(
    pairs: Sequence[PreferencePair],
    sources: tuple[Source, Source],
    models: tuple[TextModel, TextModel],
    limits: Limits,
    workers: int,
    done: Callable[[int], object] = lambda number: None,
) -> Part:
    """Do `prepare_pairs` in so many processes, with the same result.

    sources, models: teacher and student, as the processes load them and as they are here.
    """
    parts = parts_of(pairs)
    # Not by fork: JAX and the tokenizers have threads, and locks that would never open in a copy.
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, _begin, (sources, limits))

    def found() -> Iterator[Part]:
        number = 0
        try:
            for one in pool.map(_work, parts):
                yield one
                number += 1
        except BrokenProcessPool:  # one was killed, perhaps for its memory: this process can do it alone
            # The rest may wait for a lock that died with it, and the pool ends them by SIGTERM, which they ignore.
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.kill()
            yield from (prepare_part(part, *models, limits) for part in parts[number:])

    try:
        return gathered(parts, found(), done)
    finally:
        pool.shutdown(cancel_futures=True)


_given: tuple[TextModel, TextModel, Limits]  # of this process, which is one of the workers


def _begin(sources: tuple[Source, Source], limits: Limits) -> None:
    """What a worker does first."""
    global _given
    # A signal to the whole group asks the run to stop, and the run then ends its workers. If it is killed, they end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    teacher, student = (load_text_model(*source) for source in sources)
    _given = teacher, student, limits


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(part: Sequence[PreferencePair]) -> Part:
    return prepare_part(part, *_given)
