"""What a command says: quiet or not, in a file too, and what ends it."""

import errno
import gc
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from helpers import MICRO

from ctpd_jax.cli import main
from ctpd_jax.errors import UserError, lacking
from ctpd_jax.processes import messages
from ctpd_jax.processes.loops import last_line
from ctpd_jax.train.metrics import Progress


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_logged_and_little_is_shown(tmp_path, capsys):
    log = tmp_path / "logs" / "run.jsonl"
    with messages.heard(log, quiet=True):
        messages.say("half of it is there")
        with Progress(3, "train") as progress:
            progress.write("compiling")
            progress.update(3, loss=0.5)
        messages.say("a checkpoint is not whole", logging.WARNING)
    messages.say("heard again")
    found = lines_of(log)
    assert [line["level"] for line in found] == ["info", "info", "info", "warning"]
    assert found[1]["message"] == "compiling" and found[2]["message"].startswith("train 3/3 (100%), ")
    assert all(isinstance(line["time"], float) for line in found)
    shown = capsys.readouterr()
    assert shown.out == "heard again\n" and shown.err == "a checkpoint is not whole\n"


def test_a_log_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for log in (tmp_path, tmp_path / "file" / "run.jsonl"):
        assert main(["report", "--workdir", str(tmp_path)]) == 2  # it has no log, and no run
        arguments = ["evaluate", "--config", MICRO, "--workdir", str(tmp_path / "run"), "--log", str(log)]
        assert main(arguments) == 2
        assert f"--log {log} cannot be written" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def failing(error: BaseException):
    def run(job, name):
        raise error

    return run


OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\n[more]")


def system(number: int, *name: str) -> OSError:
    return OSError(number, os.strerror(number), *name)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (system(errno.ENOSPC), "RUN: there is no space left; free some"),
        (system(errno.EDQUOT, "a/file"), "a/file: there is no space left"),
        (system(errno.EROFS, "a/file"), "a/file: it lies on a file system that is read-only"),
        (system(errno.EACCES, "a/file"), "a/file: this user may not read or write it"),
        (system(errno.EIO), "RUN: the disk does not answer"),
        (system(errno.EMFILE), "RUN: too many files are open; raise `ulimit -n`"),
        (ValueError("Failed to write 9 bytes: No space left on device [os_error_code='28']"), "RUN: there is no space"),
        (MemoryError("Unable to allocate 512. GiB"), "The host has too little memory (Unable to allocate 512. GiB)"),
        (OUT_OF_MEMORY, "The device has too little memory (Out of memory allocating 8589934592 bytes)"),
    ],
    ids=["full", "quota", "read-only", "rights", "disk", "files", "tensorstore", "host", "device"],
)
def test_what_the_machine_lacks_is_told_in_a_sentence(tmp_path, capsys, monkeypatch, error, told):
    monkeypatch.setattr("ctpd_jax.stages.evaluate.run", failing(error))
    log, workdir = tmp_path / "log.jsonl", tmp_path / "run"
    assert main(["evaluate", "--config", MICRO, "--workdir", str(workdir), "--log", str(log)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"ctpd evaluate: {told.replace('RUN', str(workdir))}") and said[-1].endswith(".")
    assert lines_of(log)[-1]["level"] == "error" and lines_of(log)[-1]["message"] == said[-1]


def test_a_fault_of_ours_is_not_hidden(tmp_path, monkeypatch):
    assert (
        lacking(KeyError("loss")) is None and lacking(FileNotFoundError(errno.ENOENT, "there is no such file")) is None
    )
    monkeypatch.setattr("ctpd_jax.stages.evaluate.run", failing(RuntimeError("INVALID_ARGUMENT")))
    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"):
        main(["evaluate", "--config", MICRO, "--workdir", str(tmp_path / "run")])


def test_what_an_error_came_from_is_looked_at_too():
    try:
        try:
            raise system(errno.ENOSPC)
        except OSError as error:
            raise ValueError("the save failed") from error
    except ValueError as error:
        assert "no space left" in str(lacking(error))
    assert lacking(UserError("a sentence")) is None
    try:
        try:
            raise system(errno.ENOSPC)
        except OSError:
            raise KeyError("another one") from None
    except KeyError as error:
        assert lacking(error) is None


def test_the_last_line_says_what_lies_where(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ctpd_jax.stages.evaluate.run", lambda job, name: job.say("much of it"))
    run, arguments = tmp_path / "run", ["evaluate", "--config", MICRO, "--workdir", str(tmp_path / "run"), "--quiet"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"In {run}: nothing yet.\n"
    (run / "export").mkdir()
    (run / "evaluation.json").write_text("{}")
    assert main(arguments) == 0
    there = "export/ (the student in Hugging Face format), evaluation.json (the evaluation)"
    assert capsys.readouterr().out == f"In {run}: {there}.\n"


def test_after_an_interrupted_command_nothing_is_said_by_what_it_left(tmp_path, monkeypatch, capfd):
    class Loop:
        def __init__(self):
            self.itself = self  # only the collector finds it

        def __del__(self):
            raise ValueError("Invalid file descriptor: -1")

    def stage(job, name):
        loop = Loop()
        raise KeyboardInterrupt(repr(type(loop)))

    monkeypatch.setattr("ctpd_jax.stages.evaluate.run", stage)
    told: list = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    assert main(["evaluate", "--config", MICRO, "--workdir", str(tmp_path / "run")]) == 130
    gc.collect()
    error = capfd.readouterr().err
    assert error.splitlines()[-1].endswith("interrupted; the same command goes on from the last checkpoint")
    assert not told
    sys.unraisablehook(SimpleNamespace(exc_value=KeyError("another")))
    assert len(told) == 1  # it hears of others again


def test_what_libraries_say_at_exit_comes_after_no_last_line():
    # As TensorBoard's writer does, whose file cannot be flushed to a full disk.
    script = "import atexit; from ctpd_jax.processes import loops; atexit.register(lambda: 1 / 0); loops.last_line()"
    for after, silent in (("", True), ("; atexit.unregister(loops.mute)", False)):
        told = subprocess.run([sys.executable, "-c", script + after], capture_output=True, text=True)
        assert (told.stderr == "") == silent, told.stderr


def test_a_loop_that_was_closed_has_no_last_word_and_everything_else_has(monkeypatch):
    said: list = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: said.append(error))
    monkeypatch.setattr(sys, "unraisablehook", lambda given: said.append(given.exc_value))
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.WARNING)
    for _ in range(2):
        last_line()
    closed, other = RuntimeError("Event loop is closed"), RuntimeError("another")
    for error in (closed, other):
        sys.excepthook(RuntimeError, error, None)
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert said == [other, other]
