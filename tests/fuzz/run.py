"""Fuzz the text rooms.

    make fuzz                                                      # a million alignments, and the rest
    python tests/fuzz/run.py --seconds 60 --seed 7                 # for a minute
    python tests/fuzz/run.py --seed 7 --only alignments --task 12  # what a failure names, once more

The work is cut into tasks, each with a seed of its own, so that one that failed can be repeated alone. The last line
is a summary; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:  # as a script, which finds its own folder first
    sys.path[0] = str(TESTS)

from fuzz import SHOWN, Found, alignments, files, templates  # noqa: E402

# Of each part, how many batches make a task.
BATCHES = {"alignments": 20, "templates": 10, "files": 10}
UNITS = {"alignments": "alignments", "templates": "renderings", "files": "files"}
# And how many of its units there are for each alignment that is asked for; and its share of the time.
AMOUNTS = {"alignments": 1.0, "templates": 0.01, "files": 0.005}
MOST_BYTES = 6 << 30  # of a worker; the real tokenizers take two of them
SHARES = {"alignments": 0.7, "templates": 0.15, "files": 0.15}


@cache
def _pool(real: bool) -> alignments.Pool:
    from helpers import real_assets

    return alignments.Pool(alignments.contents_of(real_assets.real_tokenizers() if real else {}))


def run_task(part: str, seed: int, task: int, real: bool, folder: str, batches: int | None = None) -> Found:
    """One task of a part: everything in it follows from the seed and its number."""
    found, told = Found(), f"{seed} --only {part} --task {task}" + ("" if real else " --small")
    rng = random.Random(f"{seed}:{part}:{task}")
    if part == "templates" and task == 0 and batches is None:
        templates.run_hostile(told, found)
    if part == "alignments":
        _pool(real).grown = []
    for number in range(batches or BATCHES[part]):
        if part == "alignments":
            alignments.run_batch(rng, _pool(real), told, found)
        elif part == "templates":
            templates.run_batch(rng, told, found)
        else:
            files.run_batch(rng, Path(folder, str(task), str(number)), told, found)
    return found


def _begin() -> None:
    """What a worker does first: the processes are the parallelism, and remarks on templates and panics are not read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))  # a MemoryError here, and not the whole machine's
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def run_part(part: str, amount: float, seconds: float, seed: int, real: bool, pool: Any, workers: int) -> Found:
    """Tasks of a part, in the pool, until there is enough of it or the time is over."""
    found, began, told, task = Found(), time.monotonic(), 0.0, 0
    folder = tempfile.mkdtemp(prefix="ctpd-fuzz-")
    running: list[Any] = []
    while True:
        # 1. Enough is enough; what has been begun is still waited for.
        passed, done = time.monotonic() - began, found.counts[UNITS[part]]
        over = done >= amount or passed >= seconds or len(found.failures) >= 100
        while not over and len(running) < workers:
            running.append(pool.submit(run_task, part, seed, task, real, folder))
            task += 1
        if not running:
            break
        if passed - told > 30:
            told = passed
            print(f"  {part}: {done:,} in {passed:.0f} s, {len(found.failures)} failures", flush=True)
        # 2. What is ready.
        ready, _ = wait(running, 1.0, FIRST_COMPLETED)
        for one in ready:
            running.remove(one)
            result = one.result()
            found.merge(result)
            for failure in result.failures[:SHOWN]:
                print(f"FAILED {failure}", flush=True)
    counts = ", ".join(f"{name} {number:,}" for name, number in sorted(found.counts.items()))
    print(f"{part}: {counts}; {len(found.failures)} failures, {time.monotonic() - began:.0f} s", flush=True)
    return found


def summary(found: Found, seconds: float) -> str:
    """The last line."""
    count = found.counts
    return (
        f"fuzz: {count['alignments']:,} alignments, {count['renderings']:,} template renderings, "
        f"{count['rows']:,} rows in {count['files']:,} files, {len(found.failures)} failures, {seconds:.0f} s"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alignments", type=int, default=1_000_000, help="how many; the other parts are in proportion")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(BATCHES), help="one part")
    parser.add_argument("--task", type=int, help="one task of that part, in this process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="without the real tokenizers")
    given = parser.parse_args(arguments)
    if given.task is not None and given.only is None:
        parser.error("--task needs --only")
    began, found = time.monotonic(), Found()
    parts = [given.only] if given.only else list(BATCHES)
    if given.task is not None:
        found = run_task(given.only, given.seed, given.task, not given.small, tempfile.mkdtemp(prefix="ctpd-fuzz-"))
        for failure in found.failures:
            print(f"FAILED {failure}")
    else:
        if not given.small and "alignments" in parts:
            from helpers import real_assets

            real_assets.real_tokenizers()  # built once, before two processes ask for them
        shares = sum(SHARES[part] for part in parts)
        # Not multiprocessing.Pool, which waits for ever for what a worker that was killed had in its hands.
        with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"), _begin) as pool:
            for part in parts:
                seconds, amount = given.seconds * SHARES[part] / shares, given.alignments * AMOUNTS[part]
                try:
                    found.merge(run_part(part, amount, seconds, given.seed, not given.small, pool, given.workers))
                except BrokenProcessPool:
                    print(f"FAILED {part}: a worker was killed; what this part had done is not counted", flush=True)
                    found.failures.append(f"{part}: a worker was killed")
                    break
    print(summary(found, time.monotonic() - began))
    return int(bool(found.failures))


if __name__ == "__main__":
    sys.exit(main())
