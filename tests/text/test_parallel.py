"""Pairs prepared by several processes: the same as by one, whatever happens to them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from ctpd_jax.processes import preempt
from ctpd_jax.schema import Message, PreferencePair
from ctpd_jax.text import parallel, prepare
from ctpd_jax.text.parallel import Source, prepare_in_processes
from ctpd_jax.text.prepare import Limits, prepare_pairs
from ctpd_jax.text.prompts import load_text_model

LIMITS = Limits(prompt=60, response=40)


@pytest.fixture
def given(toy_models, monkeypatch):
    """Pairs in twelve parts, some of which cannot be used, and where the processes find the models."""
    monkeypatch.setattr(prepare, "BATCH", 5)
    sources = tuple(Source(str(folder), "auto", "") for folder in toy_models)
    words = ["the", "fox", "jumps", "over", "naïve", "日本", "dogs", "<|im_end|>", "again"]
    rng = np.random.default_rng(0)

    def text(most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(1, most)))

    pairs = [PreferencePair(f"p{i}", (Message("user", text(9)),), text(30), text(30)) for i in range(57)]
    pairs[7] = PreferencePair("same", (Message("user", "Why?"),), "yes " * 60, "yes " * 60)  # nothing is left of it
    return pairs, sources, tuple(load_text_model(*source) for source in sources)


def described(pairs):
    sides = [(pair.chosen, pair.rejected) for pair in pairs]
    arrays = [(s.bounds, s.teacher.ids, s.teacher.span_ids, s.student.ids, s.student.span_ids) for s in sum(sides, ())]
    prompts = [(pair.teacher_prompt, pair.student_prompt) for pair in pairs]
    return [[array.tolist() for array in own] for own in arrays + prompts]


def test_the_result_is_that_of_one_process(given):
    pairs, sources, models = given
    told: list[int] = []
    found, counters = prepare_in_processes(pairs, sources, models, LIMITS, 2, told.append)
    expected, counted = prepare_pairs(pairs, *models, LIMITS)
    assert [pair.id for pair in found] == [pair.id for pair in expected] and len(found) == 56
    assert described(found) == described(expected) and [p.truncated for p in found] == [p.truncated for p in expected]
    assert counters == counted and counters["left out: answers identical within the response limit"] == 1
    assert told == [5] * 11 + [2]


def test_a_process_that_is_killed_costs_nothing_but_time(given, monkeypatch):
    pairs, sources, models = given
    pairs, killed, done_here = [replace(pair, id=f"{n}{pair.id}") for n in range(20) for pair in pairs], [], []

    def here(part, *rest):
        done_here.append(len(part))
        return prepare.prepare_part(part, *rest)

    monkeypatch.setattr(parallel, "prepare_part", here)

    def kill_one(number: int) -> None:
        if not killed:
            child, other = multiprocessing.active_children()
            os.kill(other.pid, signal.SIGSTOP)  # as one that waits for a lock which the killed one held
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)
            child.join()

    found, counters = prepare_in_processes(pairs, sources, models, LIMITS, 2, kill_one)
    expected, counted = prepare_pairs(pairs, *models, LIMITS)
    assert (
        killed and 0 < sum(done_here) < len(pairs) and described(found) == described(expected) and counters == counted
    )


def test_a_run_that_is_asked_to_stop_leaves_no_process(given, monkeypatch):
    def stop(what: str) -> None:
        raise preempt.Preempted(what)

    monkeypatch.setattr(preempt, "check", stop)
    with pytest.raises(preempt.Preempted):
        prepare_in_processes(given[0], *given[1:], LIMITS, 2)
    assert not multiprocessing.active_children()


def test_processes_end_with_a_run_that_is_killed_and_ignore_a_signal_to_the_group(given):
    """The group is sent SIGTERM: the run alone takes it. Then the run is killed: nobody is left."""
    code = f"""
import multiprocessing, sys, time
from ctpd_jax.text import prepare
from ctpd_jax.text.parallel import Source, prepare_in_processes
from tests.text.test_parallel import LIMITS
if __name__ == "__main__":
    import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)
    prepare.BATCH = 1
    def told(number):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
    from ctpd_jax.schema import Message, PreferencePair
    pairs = [PreferencePair(str(i), (Message("user", "Why?"),), "the fox", "the dog") for i in range(8)]
    sources = tuple(Source(path, "auto", "") for path in {[source.path for source in given[1]]!r})
    from ctpd_jax.text.prompts import load_text_model
    prepare_in_processes(pairs, sources, tuple(load_text_model(*s) for s in sources), LIMITS, 2, told)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=parallel_root()
    )
    assert run.stdout is not None
    children = [int(number) for number in run.stdout.readline().split()]
    assert len(children) == 2
    os.killpg(run.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert run.poll() is None and all(map(alive, children))
    run.kill()
    run.wait()
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, children))


def parallel_root() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_few_pairs_are_not_worth_a_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(100)), raising=False)
    assert parallel.workers_for(8000) < 2 and parallel.workers_for(8192) == 2 and parallel.workers_for(90_000) == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert parallel.workers_for(61_000) == 2
