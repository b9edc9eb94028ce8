"""A whole run whose workdir is in a bucket: killed, its machine lost, and given again; and its inputs from buckets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.run import differences, outcome
from helpers import MICRO
from helpers.object_store import Store, served

from ctpd_jax.buckets.twin import INDEX

KILLS = 10


def ctpd(store: Store, cache: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, **store.environment, "CTPD_CACHE": str(cache), "CTPD_BUCKET_SECONDS": "0.3"}
    command = [sys.executable, "-m", "ctpd_jax.cli", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    told, _ = process.communicate(timeout=300)
    return process.returncode, told


def disturbed(method: str, name: str, seen: list[int]) -> int | None:
    """Every seventh write, and every eleventh read, is refused once."""
    seen.append(0)
    return 503 if len(seen) % 7 == 0 and method == "POST" else 500 if len(seen) % 11 == 0 and method == "GET" else None


def killer(child: subprocess.Popen, at: int) -> Callable[[int], None]:
    return lambda count: os.kill(child.pid, signal.SIGKILL) if count == at else None


@pytest.mark.slow
def test_killed_ten_times_with_its_machine_lost_each_time_it_ends_as_an_undisturbed_run(finished_micro, tmp_path):
    asked: list[int] = []
    store = Store(late=0.5, fault=lambda method, name: disturbed(method, name, asked))
    command = ["run", "--config", MICRO, "--workdir", "gs://bucket/run"]
    with served(store):
        for kill in range(KILLS):
            # 1. The store itself kills, in the middle of a round: after so many more objects.
            child = ctpd(store, tmp_path / "cache", *command)
            store.after_write = killer(child, len(store.written) + 9 + 4 * kill)
            code, told = ended(child)
            assert code == -signal.SIGKILL, told
            # 2. What the bucket has is a state of the run; the disk of the machine is gone.
            if f"run/{INDEX}" in store.objects:
                index = json.loads(store.objects[f"run/{INDEX}"])
                assert all(f"run/{name}" in store.objects for name in index["files"])
            shutil.rmtree(tmp_path / "cache")
        # 3. At last nobody kills.
        store.after_write = lambda count: None
        code, told = ended(ctpd(store, tmp_path / "cache", *command))
        assert code == 0, told
        assert told.splitlines()[-1] == "gs://bucket/run: up to date."
    # The bucket alone says how it ended.
    for name, data in store.objects.items():
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    stages = ("teacher_sft", "student_sft", "positive", "negative", "student_dpo", "train")
    whole, found = (outcome(folder, stages) for folder in (finished_micro, tmp_path / "bucket" / "run"))
    assert differences(whole, found) == []
    assert json.loads(store.objects[f"run/{INDEX}"])["writer"] is None


@pytest.mark.slow
def test_two_commands_do_not_write_into_one_bucket(finished_micro, tmp_path):
    store = Store()
    command = ["run", "--config", MICRO, "--workdir", "gs://bucket/run"]
    with served(store):
        first = ctpd(store, tmp_path / "a", *command)
        while f"run/{INDEX}" not in store.objects:
            assert first.poll() is None, first.communicate()[0]
        # Of one machine that is known at once; of another one it takes minutes (test_twin.py).
        code, told = ended(ctpd(store, tmp_path / "b", *command))
        assert code == 2 and "Another command is at work in gs://bucket/run" in told, told
        # Who only looks may, and is told who is at work.
        while "run/config.json" not in store.objects:
            assert first.poll() is None, first.communicate()[0]
        code, told = ended(ctpd(store, tmp_path / "a", "status", "--workdir", "gs://bucket/run"))
        assert code == 0 and "is at work" in told, told
        first.send_signal(signal.SIGTERM)
        code, told = ended(first)
        assert code == 75 and "gs://bucket/run: up to date." in told
