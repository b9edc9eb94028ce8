"""annotate.devices=all: a model that no process holds reads on all of them, to the numbers that one device gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import MICRO
from helpers.processes import two_processes

from ctpd_jax.annotate.store import open_store
from ctpd_jax.processes import preempt
from ctpd_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow
SETTINGS = [
    "--config", MICRO, "--config.annotate.devices=all", "--config.mesh.data=2", "--config.mesh.fsdp=4",
    "--config.annotate.pairs_per_shard=8", "--config.stall_minutes=2",
]  # fmt: skip


def without_annotations(finished_micro: Path, workdir: Path) -> Path:
    """A copy of a run of one device that has to be annotated and evaluated again."""
    shutil.copytree(finished_micro, workdir)
    for folder in ("annotations", "evaluation"):
        shutil.rmtree(workdir / folder)
    (workdir / "evaluation.json").unlink()
    return workdir


def scores(workdir: Path) -> dict[tuple, np.ndarray]:
    """Every log-probability of the store, by pair, side and scorer."""
    return {
        (number, side, scorer): values
        for number, (_, measured) in enumerate(open_store(workdir / "annotations"))
        for side, columns in measured.items()
        for scorer, values in columns.items()
    }


def assert_close(workdir: Path, alone: Path) -> None:
    found, expected = scores(workdir), scores(alone)
    assert found.keys() == expected.keys() and len(found) > 100
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=1e-4, rtol=1e-4, err_msg=str(key))


def finished(processes: list, workdir: Path) -> list[str]:
    codes = [process.wait(300) for process in processes]
    told = [workdir.with_suffix(f".{number}.log").read_text() for number in range(2)]
    assert codes == [0, 0], told[0][-3000:] + told[1][-3000:]
    return told


def test_two_processes_read_with_one_copy_what_one_device_reads(finished_micro, tmp_path):
    workdir = without_annotations(finished_micro, tmp_path / "together")
    for command in ("annotate", "evaluate"):
        finished(two_processes(workdir, [command, *SETTINGS]), workdir)
    assert_close(workdir, finished_micro)
    found, expected = (json.loads((one / "evaluation.json").read_text()) for one in (workdir, finished_micro))
    assert found["models"].keys() == expected["models"].keys()
    assert not found["samples"]["teacher"] and found["samples"]["student_start"]


def test_stopped_in_the_middle_it_goes_on_after_the_last_whole_shard(finished_micro, tmp_path):
    workdir = without_annotations(finished_micro, tmp_path / "stopped")
    arguments = ["annotate", *SETTINGS]
    processes = two_processes(workdir, arguments)
    first = workdir / "annotations" / "columns" / "reference" / "00000.f32"
    while not first.exists():
        assert all(process.poll() is None for process in processes), workdir.with_suffix(".0.log").read_text()[-3000:]
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    codes = [process.wait(300) for process in processes]  # three more models are to be read, and compiled for
    assert codes == [preempt.EXIT_CODE] * 2, workdir.with_suffix(".0.log").read_text()[-3000:]
    written = first.stat().st_mtime_ns
    finished(two_processes(workdir, arguments), workdir)
    assert first.stat().st_mtime_ns == written
    assert_close(workdir, finished_micro)


def test_a_checkpoint_that_each_process_reads_a_half_of_starts_the_same_training(finished_micro, tmp_path):
    """Of two copies of every parameter, one on each process, each reads a half, and gets the other over the links."""
    finished(two_processes(tmp_path / "run", ["sft", "--model", "student", *SETTINGS]), tmp_path / "run")
    found, expected = (read_metrics(one, "student_sft") for one in (tmp_path / "run", finished_micro))
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
