"""SIGTERM: the run saves, stops with exit code 75, and the same command goes on to the same numbers, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MICRO
from helpers.recipes import recipe_of, updates_of

from ctpd_jax import cli
from ctpd_jax.processes import preempt
from ctpd_jax.schema import Batch, RowLayout
from ctpd_jax.settings import training
from ctpd_jax.train.loop import train
from ctpd_jax.train.metrics import MetricLog, read_metrics

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": ""}

# ------------------------------------------------------------------------------------------------ one process


def test_the_signal_is_a_request_and_only_inside_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with preempt.listening():
        assert not preempt.requested() and not preempt.stop_now()
        preempt.check("nothing was asked")
        signal.raise_signal(signal.SIGTERM)
        assert preempt.requested() and preempt.stop_now()
        with pytest.raises(preempt.Preempted, match="shards are kept"):
            preempt.check("shards are kept")
    assert signal.getsignal(signal.SIGTERM) == before
    assert not preempt.requested()
    with preempt.listening():
        assert not preempt.requested()  # the next run in this process was asked nothing


def test_another_thread_leaves_the_handler_alone():
    found = []

    def listen() -> None:
        with preempt.listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_the_second_signal_kills():
    script = (
        "import time\nfrom ctpd_jax.processes import preempt\n"
        "with preempt.listening():\n    print('ready', flush=True)\n"
        "    while not preempt.requested(): time.sleep(0.01)\n    print('asked', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert "a second SIGTERM kills" in process.communicate()[1]


def test_the_command_line_says_it_in_a_sentence(tmp_path, capsys, monkeypatch):
    def stage(job, name):
        signal.raise_signal(signal.SIGTERM)
        preempt.check("2 shards are kept")

    monkeypatch.setattr("ctpd_jax.stages.evaluate.run", stage)
    arguments = ["--config", MICRO, "--workdir", str(tmp_path / "run")]
    assert cli.main(["evaluate", *arguments]) == preempt.EXIT_CODE == 75
    error = capsys.readouterr().err
    assert "ctpd evaluate: stopped in evaluate: 2 shards are kept. The same command goes on from there.\n" in error
    monkeypatch.setattr("ctpd_jax.stages.evaluate.run", lambda job, name: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["evaluate", *arguments]) == 0  # it was finished before anybody looked


STEPS = 6


def quadratic(directory: Path, sigterm_at: int | None = None) -> np.ndarray:
    """STEPS updates of four parameters; the signal comes within update `sigterm_at`, -1: before the first."""

    class Log(MetricLog):
        def log(self, stage, step, metrics):
            super().log(stage, step, metrics)
            if step == sigterm_at:
                signal.raise_signal(signal.SIGTERM)

    def sums_of(params, batch):
        loss = jnp.sum((params["model"]["norm"]["weight"] - batch.constant[0, 0]) ** 2)
        return loss, {"loss": jnp.stack([loss, jnp.ones(())]), "num_tokens": jnp.stack([jnp.ones(()), jnp.zeros(())])}

    def batches(step):
        row, slot = np.zeros((1, 4), np.int32), np.zeros((1, 2), np.int32)
        pair = np.full((1, 2), step, np.float32)
        weight, real = np.zeros((1, 2), np.float32), np.ones(1, np.float32)
        return [Batch(row, RowLayout(row, row, row), slot, slot, slot, slot, weight, pair, pair, pair, real)]

    def initial():
        if sigterm_at == -1:
            signal.raise_signal(signal.SIGTERM)
        return {"model": {"norm": {"weight": jnp.arange(4.0)}}}

    shapes = {"model": {"norm": {"weight": jax.ShapeDtypeStruct((4,), jnp.float32)}}}
    settings = training(lr=0.1, save_every=2)
    with preempt.listening(), Log(directory, tensorboard=False) as log:
        recipe = recipe_of(sums_of, shapes, settings, STEPS)
        params = train(recipe, directory / "checkpoints", initial, {}, updates_of(batches, 1), log)
    return np.asarray(params["model"]["norm"]["weight"])


def saved(directory: Path) -> list[int]:
    """The steps that are whole; nothing else lies there."""
    folders = sorted((directory / "checkpoints").iterdir())
    assert all((folder / "checksums.json").exists() for folder in folders)
    return [int(folder.name) for folder in folders]


# The signal comes while an update is logged: the next one runs by then, unless its parameters are saved first.
@pytest.mark.parametrize(("update", "saves"), [(0, 2), (1, 2), (2, 4), (3, 4)])
def test_training_saves_after_the_update_and_goes_on_from_there(tmp_path, update, saves):
    undisturbed = quadratic(tmp_path / "whole")
    with pytest.raises(preempt.Preempted, match=f"saved after update {saves} of {STEPS}"):
        quadratic(tmp_path / "stopped", sigterm_at=update)
    assert saved(tmp_path / "stopped")[-1] == saves
    assert [line["step"] for line in read_metrics(tmp_path / "stopped")] == list(range(saves))
    np.testing.assert_array_equal(quadratic(tmp_path / "stopped"), undisturbed)
    assert [line["step"] for line in read_metrics(tmp_path / "stopped")] == list(range(STEPS))


def test_training_that_has_not_begun_saves_nothing(tmp_path):
    with pytest.raises(preempt.Preempted, match="nothing to save yet"):
        quadratic(tmp_path, sigterm_at=-1)
    assert saved(tmp_path) == []


def test_training_that_was_at_its_end_is_finished(tmp_path):
    np.testing.assert_array_equal(quadratic(tmp_path, sigterm_at=STEPS - 1), quadratic(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------ several processes

AGREE = """
import json, signal, sys, time
import jax
from jax.experimental import multihost_utils
from ctpd_jax.processes import preempt

number, port, early = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "early"
with preempt.listening():
    if early and number == 0:
        signal.raise_signal(signal.SIGTERM)  # before JAX listens
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    print("ready", flush=True)
    turns = 0
    while not preempt.stop_now():
        turns += 1
        multihost_utils.process_allgather(jax.numpy.ones(1))  # would hang if the other were not there
        time.sleep(0.01 * (1 + number))
    preempt.check("the others may wait here")
    try:
        with preempt.apart("one works, the other waits"):
            deadline = time.monotonic() + 10 * (number == 0)
            while time.monotonic() < deadline:
                preempt.check("kept")
        left = False
    except preempt.Preempted:
        left = True
    print(json.dumps({"turns": turns, "again": preempt.stop_now(), "left": left}), flush=True)
sys.exit(preempt.EXIT_CODE)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["early", "later"])
def test_several_processes_stop_at_the_same_point(when):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, str(number), port, when], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            line = process.stdout.readline()
            while line != "ready\n":  # gloo talks too
                assert line, "a process ended"
                line = process.stdout.readline()
        if when == "later":
            time.sleep(1)
            processes[1].send_signal(signal.SIGTERM)  # one alone is told
        told = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    first, second = map(json.loads, told)
    assert first == second
    assert first["again"] and first["left"]
    assert when == "early" or first["turns"] > 5
    assert [process.returncode for process in processes] == [preempt.EXIT_CODE] * 2


# ------------------------------------------------------------------------------------------------ a whole run

SEED = 0
STAGES = (
    "teacher_sft", "student_sft", "positive", "negative", "annotate", "student_dpo", "train", "evaluate", "export",
)  # fmt: skip
TRAINED = tuple(stage for stage in STAGES if stage not in ("annotate", "evaluate", "export"))
COMMAND = [
    sys.executable, "-m", "ctpd_jax.cli", "run", "--config", MICRO, "--config.annotate.pairs_per_shard=8",
]  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """When SIGTERM is sent: up to `spread` seconds after what a session says, or after a file that it makes."""

    said: str = ""
    made: str = ""  # glob in the workdir
    spread: float = 0.02

    def seen(self, workdir: Path, log: str) -> bool:
        return self.said in log if self.said else any(workdir.glob(self.made))


# In the order of the run. A session is stopped at its moment, or at a later one where it has that behind it.
MOMENTS = (
    Moment(made="models.json"),
    *(Moment(said="teacher_sft: compiling", spread=spread) for spread in (0.02, 0.5)),
    *(Moment(said="student_sft: compiling", spread=spread) for spread in (0.02, 0.5)),
    Moment(made="annotations/columns/reference"),
    *(Moment(said="positive: compiling", spread=spread) for spread in (0.02, 1.0)),
    *(Moment(said="negative: compiling", spread=spread) for spread in (0.02, 1.0)),
    Moment(made="annotations/columns/positive"),
    Moment(made="annotations/columns/negative"),
    Moment(made="annotations/columns/negative/*1*"),
    Moment(made="annotations/*array_record-00001*"),
    Moment(said="student_dpo: compiling"),
    *(Moment(said="train: compiling", spread=spread) for spread in (0.02, 1.0)),
    Moment(made="evaluation/columns/ctpd"),
    Moment(made="evaluation/samples/ctpd.json"),
    Moment(said="report.html"),
)


def start(workdir: Path, log: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--workdir", str(workdir)], stdout=open(log, "wb"), stderr=subprocess.STDOUT, env=ENVIRONMENT
    )


def run_to_the_end(workdir: Path) -> None:
    log = workdir.with_suffix(".log")
    assert start(workdir, log).wait(600) == 0, log.read_text()[-3000:]


def stop_at(number: int, workdir: Path, log: Path, delay: float) -> tuple[int, str]:
    """One session, sent SIGTERM at its moment or a later one. Returns its exit code and what it said."""
    behind = {place for place, moment in enumerate(MOMENTS) if moment.made and moment.seen(workdir, "")}
    process = start(workdir, log)
    try:
        while process.poll() is None:
            told = log.read_text(errors="replace")
            if any(MOMENTS[n].seen(workdir, told) for n in range(number, len(MOMENTS)) if n not in behind):
                time.sleep(delay)
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.002)
        return process.wait(120), log.read_text(errors="replace")
    finally:
        if process.poll() is None:
            process.kill()


def half_written(workdir: Path) -> list[Path]:
    """What only a process that was cut short leaves: files written beside, steps that Orbax had not committed."""
    beside = re.compile(r"\.partial|\.new$|\.tmp$|\.old$|orbax-checkpoint-tmp|incomplete")
    found = [path for path in workdir.rglob("*") if beside.search(path.name)]
    steps = [path for path in workdir.glob("*/checkpoints/0*") if not (path / "checksums.json").exists()]
    return found + steps


def outcome(workdir: Path) -> dict:
    """Everything that a run is for."""
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    del evaluation["training"], evaluation["sha256"]  # the times of the updates, and the sum over all
    return {
        "params": {stage: json.loads((workdir / stage / "done.json").read_text())["params"] for stage in TRAINED},
        "store": json.loads((workdir / "annotations" / "manifest.json").read_text())["shards"],
        "evaluation": evaluation,
        "export": (workdir / "export" / "model.safetensors").read_bytes(),
    }


@pytest.mark.slow
def test_sigterm_at_twenty_moments_of_a_run(tmp_path):
    assert len(MOMENTS) == 20
    draw = random.Random(SEED)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    run_to_the_end(whole)
    shutil.copytree(whole / "compile_cache", stopped / "compile_cache")  # the same programs, compiled once
    hit, asked = set(), 0
    for number, moment in enumerate(MOMENTS):
        code, told = stop_at(number, stopped, tmp_path / f"{number}.log", draw.uniform(0, moment.spread))
        end = told[-3000:]
        if code == 0:  # only the last stage can be over before it looks
            assert number == len(MOMENTS) - 1, end
            continue
        assert code == preempt.EXIT_CODE, f"{moment}: exit code {code}\n{end}"
        found = re.search(r"^ctpd run: stopped (.+): .+\. The same command goes on from there\.$", told, re.M)
        assert found, end
        hit.add(found[1])
        asked += 1
        assert half_written(stopped) == [], moment
        updates = [(line["stage"], line["step"]) for line in read_metrics(stopped)]
        assert len(updates) == len(set(updates)), moment
    assert {f"in {stage}" for stage in STAGES} <= hit, sorted(hit)
    assert asked >= len(MOMENTS) - 1
    run_to_the_end(stopped)
    assert outcome(stopped) == outcome(whole)
    assert half_written(stopped) == []
    for stage in TRAINED:
        assert [line["step"] for line in read_metrics(stopped, stage)] == list(range(4))
    counted = {
        folder: sorted((line["stage"], line["step"]) for line in read_metrics(folder)) for folder in (stopped, whole)
    }
    assert counted[stopped] == counted[whole]
