"""Thousands of updates of the demo's student: what grows, and whether a hundred kills on the way change a number."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from helpers import ROOT

from faults.inject import forked, start

DEMO = str(ROOT / "configs" / "demo.py")
BEFORE = (["sft"], ["dpo"], ["dpo", "--reverse"], ["annotate"])
MOST_GROWTH = 5.0  # MB of resident memory in a thousand updates; Orbax keeps a tenth of one of every save
# What differs from one run to the next: the clock, and sums over it.
CLOCK = ("time", "seconds", "tokens_per_second", "compiled_programs", "sha256", "crc32")
STRETCH = 100  # updates
M_ARENA_MAX = -8  # of glibc's malloc.h
SETTLED = 0.25  # of the updates, after which nothing may grow


class Seen(NamedTuple):
    """What /proc says of the training process at some update."""

    update: int
    megabytes: float
    files: int
    threads: int


def run(folder: Path, updates: int, restarts: int) -> tuple[str, int]:
    """Returns what the summary says, and the number of failures."""
    settings = [
        f"--config.train.steps={updates}", "--config.train.save_every=100", "--config.train.eval_every=100",
        "--config.train.eval_pairs=32", "--config.train.keep_best=rewards/accuracies", "--config.evaluate.samples=50",
        "--config.student_proposed.steps=-1", "--config.student_dpo.steps=-1",
    ]  # fmt: skip
    whole, killed, began = folder / "long", folder / "long_killed", time.monotonic()

    # 1. What the student learns from, made once.
    for command in BEFORE:
        command_of(command, whole, settings)
    if not killed.exists():
        shutil.copytree(whole, killed)

    # 2. Undisturbed, and watched.
    seen = watched(whole, settings)
    command_of(["evaluate"], whole, settings)
    said, failures = grown(seen, whole, updates)
    print(f"long: {said}", flush=True)

    # 3. The same with kills.
    often = [*settings, "--config.train.save_every=10"]
    kills = killed_often(killed, often, updates, restarts)
    command_of(["evaluate"], killed, settings)
    different = [name for name, one in outcome(whole).items() if one != outcome(killed)[name]]
    failures += len(different) + (kills < restarts)
    same = f"differ in {', '.join(different)}" if different else "give the same parameters, lines and answers"
    print(f"long: {kills} kills {same}, {time.monotonic() - began:.0f} s", flush=True)
    return f"{updates} updates twice, {kills} restarts", failures


def command_of(command: Sequence[str], workdir: Path, settings: Sequence[str]) -> None:
    code = forked(lambda: ctpd(command, workdir, settings), workdir.with_suffix(".log"))
    assert code == 0, f"{command} ended with {code}: see {workdir.with_suffix('.log')}"


def ctpd(command: Sequence[str], workdir: Path, settings: Sequence[str]) -> int:
    from ctpd_jax.cli import main

    return main([*command, "--config", DEMO, "--workdir", str(workdir), *settings])


def with_one_pool(work: Callable[[], int]) -> int:
    """Does `work` with one pool of freed memory for all threads, where the C library is glibc.

    With one for each of a hundred threads what is kept there grows by 30 MB before it stands still: a look of some
    minutes cannot tell that from what is never freed.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    return work()


def lines_of(workdir: Path) -> list[dict]:
    """The lines of the student so far; one that is half-written is not looked at."""
    path = workdir / "metrics.jsonl"
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [found for found in map(json.loads, whole) if found["stage"] == "train"]


def watched(workdir: Path, settings: Sequence[str]) -> list[Seen]:
    """Trains the student, and looks at its process every second."""
    process, seen = (
        start(partial(with_one_pool, lambda: ctpd(["train"], workdir, settings)), workdir.with_suffix(".log")),
        [],
    )
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if lines := lines_of(workdir):
            proc = Path(f"/proc/{process}")
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            if "VmRSS" in status:  # else it is just ending
                size, threads = int(status["VmRSS"].split()[0]) / 1000, int(status["Threads"])
                seen.append(Seen(lines[-1]["step"], size, len(os.listdir(proc / "fd")), threads))
        time.sleep(1)
    assert os.waitstatus_to_exitcode(ended[1]) == 0, f"see {workdir.with_suffix('.log')}"
    return seen


def grown(seen: Sequence[Seen], workdir: Path, updates: int) -> tuple[str, int]:
    """Says what has grown since the first quarter, and how much of that is too much."""
    later = [each for each in seen if each.update >= SETTLED * updates]
    # What a save holds for a moment, or has just given back, is no growth: of every stretch of updates the median.
    stretches: dict[int, list[float]] = {}
    for each in later:
        stretches.setdefault(each.update // STRETCH, []).append(each.megabytes)
    usual = [(STRETCH * number, np.median(found)) for number, found in stretches.items()]
    slope = 1000 * float(np.polyfit(*zip(*usual), 1)[0])
    files, threads = ([getattr(each, what) for each in later] for what in ("files", "threads"))
    lines = lines_of(workdir)
    programs = {line["compiled_programs"] for line in lines[int(SETTLED * updates) :]}
    failures = sum(map(bool, (  # of NumPy's, whose sum is no exit code
        slope > MOST_GROWTH,
        np.median(files[-5:]) > np.median(files[:5]) + 2,
        np.median(threads[-5:]) > np.median(threads[:5]) + 2,
        len(programs) != 1,
        [line["step"] for line in lines] != list(range(updates)),
    )))  # fmt: skip
    said = (
        f"{updates} updates, memory {later[0].megabytes:.0f} to {later[-1].megabytes:.0f} MB ({slope:+.1f} MB in 1,000 "
        f"updates), open files {files[0]} to {files[-1]}, threads {threads[0]} to {threads[-1]}, "
        f"programs {sorted(programs)}, lines {len(lines)}; {failures} of these are wrong"
    )
    return said, failures


def killed_often(workdir: Path, settings: Sequence[str], updates: int, restarts: int) -> int:
    """Trains the student; kills it a moment after every so many updates, wherever it is then."""
    kills, chance = 0, random.Random(0)
    for number in range(restarts + 1):
        process = start(lambda: ctpd(["train"], workdir, settings), workdir.with_suffix(".log"))
        target = (number + 1) * updates // (restarts + 1) if number < restarts else updates
        while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
            lines = lines_of(workdir)
            if number < restarts and lines and lines[-1]["step"] + 1 >= target:
                time.sleep(chance.uniform(0, 1))
                os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        code = os.waitstatus_to_exitcode(ended[1])
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), f"ended with {code}: see {workdir.with_suffix('.log')}"
    return kills


def outcome(workdir: Path) -> dict[str, object]:
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines_of(workdir)]
    return {
        "parameters": json.loads((workdir / "train" / "done.json").read_text())["params"],
        "lines": lines,
        "answers": {path.name: path.read_text() for path in (workdir / "evaluation" / "samples").iterdir()},
    }
