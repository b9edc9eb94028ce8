"""How far a run has come, as another process reads it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading

import pytest
from helpers import MICRO

from ctpd_jax.cli import main
from ctpd_jax.errors import UserError
from ctpd_jax.job.job import alone_in
from ctpd_jax.job.status import is_news, spoken, status


@pytest.fixture
def half_done(finished_micro, tmp_path):
    """A run that is at its student, three updates after a restart."""
    shutil.copytree(finished_micro, tmp_path / "run")
    run = tmp_path / "run"
    for name in ("train/done.json", "evaluation.json", "export.json"):
        (run / name).unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["stage"] != "train" and not line["stage"].startswith("eval")]
    steps = [{"stage": "train", "step": step, "time": 1000.0 + step, "seconds": 40.0, "loss": 0.5} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept + steps))
    return run


def test_a_run_that_is_at_work_is_told_stage_by_stage(half_done):
    with alone_in(half_done):
        told = status(half_done, now=1075.0).splitlines()
    assert told[0].startswith(f"{half_done}: process ") and told[0].endswith(" is at work, last heard 1:13 min ago")
    states = {line.split()[0]: line.split(maxsplit=1)[1] for line in told[1:]}
    assert states["positive"] == "finished, 4 updates" and states["annotate"] == "finished"
    assert states["train"] == "update 3 of 4, 40 s each, 40 s left; loss 0.5"
    assert states["evaluate"] == states["export"] == "not finished"
    assert "student_uld" in states["left"] and "student_uld" not in states


def test_the_page_is_written_for_what_ended_since_and_where_it_is_missing(half_done):
    page = half_done / "report.html"
    os.utime(page)
    assert not is_news(half_done, "positive") and not is_news(half_done, "train")
    (half_done / "train" / "done.json").write_text("{}")
    os.utime(page, ns=(0, page.stat().st_mtime_ns - 1_000_000_000))
    assert is_news(half_done, "train")
    page.unlink()
    assert is_news(half_done, "student_uld")  # left out, but what is there can be shown


def test_a_finished_stage_is_neither_weighed_nor_shown_again(finished_micro, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished_micro, tmp_path / "run")
    os.utime(tmp_path / "run" / "report.html")

    def again(*_):
        raise AssertionError("it is done")

    monkeypatch.setattr("ctpd_jax.stages.train.training_items", again)
    monkeypatch.setattr("ctpd_jax.report.page.write_report", again)
    assert main(["train", "--config", MICRO, "--workdir", str(tmp_path / "run")]) == 0
    assert "train: finished before." in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_told(half_done):
    with open(half_done / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"stage": "train", "step": 3, "time": 1004.0, "seconds": 40.0, "loss": None}) + "\n")
    assert "update 4 of 4, 40 s each, 0 s left; loss not finite" in status(half_done)


def test_whoever_asks_keeps_no_command_from_starting(half_done):
    """The lock is tried, which holds it for a moment; a command that begins just then tries again."""
    with open(half_done / "lock") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.05, asking.close).start()
        with alone_in(half_done):
            assert "is at work" in status(half_done)


def test_nothing_is_written_and_nobody_has_to_be_at_work(half_done, capsys):
    before = {path: path.stat().st_mtime_ns for path in half_done.rglob("*")}
    assert main(["status", "--workdir", str(half_done)]) == 0
    assert "no process is at work" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in half_done.rglob("*")} == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        status(tmp_path)


def test_times_are_spoken():
    assert [spoken(s) for s in (0.2, 59.4, 61, 3599, 3661)] == ["0 s", "59 s", "1:01 min", "59:59 min", "1:01:01 h"]
