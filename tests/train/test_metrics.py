"""metrics.jsonl is always JSON and never says a step twice; the bar says what it should."""

import io
import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ctpd_jax.artifacts import finish
from ctpd_jax.errors import UserError
from ctpd_jax.processes import messages
from ctpd_jax.train.metrics import METRICS, MetricLog, Progress, lost_lines, read_metrics


def steps(workdir, stage=None):
    return [(line["stage"], line["step"]) for line in read_metrics(workdir, stage)]


def scalars(workdir, stage, tag):
    """What TensorBoard shows: {step: value}, after it has purged what a restart purges."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir / "tensorboard" / stage))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_line_that_was_changed_is_named(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in range(3):
            log.log("train", step, {"loss": 0.5, "note": "é", "lr": 1e-6, "none": float("nan")})
    path = tmp_path / METRICS
    whole, lines = path.read_bytes(), read_metrics(tmp_path)
    assert [line["loss"] for line in lines] == [0.5] * 3 and "crc32" not in lines[0]
    path.write_bytes(whole.replace(b"0.5", b"0.4", 1))
    with pytest.raises(UserError, match=r"metrics\.jsonl:1 is damaged .*; remove that line"):
        read_metrics(tmp_path)
    path.write_bytes(whole + b"[" * 10**5 + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:4 is not JSON"):
        read_metrics(tmp_path)
    path.write_text('{"stage": "train", "step": 0, "time": 1.0, "loss": 0.5}\n')  # an earlier version's
    assert read_metrics(tmp_path)[0]["loss"] == 0.5


def test_lines_that_are_lost_are_counted(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in range(3):
            log.log("train", step, {"loss": 0.5})
    (tmp_path / "train").mkdir()
    finish(tmp_path / "train", {"told": 3})
    (tmp_path / "sft").mkdir()
    finish(tmp_path / "sft", {"params": "an earlier version's"})
    lines = read_metrics(tmp_path)
    assert lost_lines(tmp_path, lines) == [] and lost_lines(tmp_path, lines[:2]) == ["train"]
    assert lost_lines(tmp_path, []) == []  # a stage that was copied from another run


def test_a_line_is_flat_json_of_plain_numbers(tmp_path):
    with MetricLog(tmp_path) as log:
        log.log("train", 3, {"loss": jnp.float32(0.5), "n": np.int64(7), "ok": True, "note": "é", "lr": 1e-6, "k": 2})
    (text,) = (tmp_path / METRICS).read_text("utf-8").splitlines()
    line = json.loads(text)
    assert line.pop("time") > 1.7e9 and len(line.pop("crc32")) == 8
    assert line == {"stage": "train", "step": 3, "loss": 0.5, "n": 7, "ok": True, "note": "é", "lr": 1e-6, "k": 2}
    assert isinstance(line["n"], int) and isinstance(line["ok"], bool)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), jnp.float32(jnp.inf)])
def test_what_is_not_finite_is_null(tmp_path, value):
    with MetricLog(tmp_path) as log:
        log.log("train", 1, {"loss": value})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert line["loss"] is None


def test_what_is_no_metric_is_refused(tmp_path):
    log = MetricLog(tmp_path)
    with pytest.raises(ValueError, match="'step'"):
        log.log("train", 1, {"step": 3})
    with pytest.raises(TypeError, match="list"):
        log.log("train", 1, {"loss": [1.0]})
    assert steps(tmp_path) == []


def test_rewind_forgets_the_later_steps_of_its_stage_only(tmp_path):
    with MetricLog(tmp_path) as log:
        for stage in ("sft", "train"):
            for step in range(5):
                log.log(stage, step, {"loss": step})
        log.rewind("train", 2)
        assert steps(tmp_path) == [("sft", s) for s in range(5)] + [("train", s) for s in range(3)]
        log.log("train", 3, {"loss": 30})
        log.rewind("sft", -1)
    assert steps(tmp_path) == [("train", s) for s in range(4)]
    assert read_metrics(tmp_path, "train")[-1]["loss"] == 30
    assert read_metrics(tmp_path, "sft") == []
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".partial"] == []


def test_tensorboard_shows_the_same_numbers_also_after_a_rewind(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in range(5):
            log.log("train", step, {"rewards/margins": step, "note": "no number"})
        log.log("sft", 0, {"rewards/margins": 7})
    with MetricLog(tmp_path) as log:
        log.rewind("train", 2)
        log.log("train", 3, {"rewards/margins": 30})
    assert scalars(tmp_path, "train", "rewards/margins") == {0: 0, 1: 1, 2: 2, 3: 30}
    assert scalars(tmp_path, "sft", "rewards/margins") == {0: 7}


def test_a_rewind_in_the_same_second_overwrites_no_event_file(tmp_path):
    with MetricLog(tmp_path) as log:
        log.log("train", 0, {"loss": 1})
        log.rewind("train", 0)
        log.log("train", 1, {"loss": 2})
    assert scalars(tmp_path, "train", "loss") == {0: 1, 1: 2}


def test_a_torn_last_line_is_dropped(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.log("train", 1, {"loss": 1})
    with open(tmp_path / METRICS, "ab") as out:
        out.write('{"stage": "train", "note": "é'.encode()[:-1])
    assert steps(tmp_path) == [("train", 1)]
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.log("train", 2, {"loss": 1})
    assert steps(tmp_path) == [("train", 1), ("train", 2)]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("bad", ["{oops", "[1]", '{"loss": 1}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, bad):
    good = '{"stage": "train", "step": 1, "time": 0}\n'
    (tmp_path / METRICS).write_text(good + bad + "\n" + good)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    with MetricLog(tmp_path / "run", active=False) as log:
        log.log("train", 1, {"loss": 1})
        log.rewind("train", 0)
    assert not (tmp_path / "run").exists()
    out = io.StringIO()
    with Progress(10, "train", active=False, stream=out) as progress:
        progress.update(10)
        progress.write("hello")
    assert out.getvalue() == "" and progress.done == 10


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_every_few_seconds():
    out, now = io.StringIO(), [0.0]
    with Progress(1000, "train", done=300, every=30, stream=out, clock=lambda: now[0]) as progress:
        for number in range(100):
            now[0] += 1
            progress.update(1, loss=0.5 if number < 40 else 0.25)
        progress.write("saved")
    assert out.getvalue().splitlines() == [
        "train 330/1000 (33%), 1 step/s, 11:10 left, loss=0.5",
        "train 360/1000 (36%), 1 step/s, 10:40 left, loss=0.25",
        "train 390/1000 (39%), 1 step/s, 10:10 left, loss=0.25",
        "saved",
        "train 400/1000 (40%), 1 step/s, 1:40 in all, loss=0.25",
    ]


def test_on_a_terminal_a_bar():
    out = Terminal()
    with Progress(4, "train", done=1, stream=out) as progress:
        progress.update(3, loss=0.123456)
        progress.write("a line above")
    assert "4/4" in out.getvalue() and "loss=0.1235" in out.getvalue() and "a line above" in out.getvalue()


@pytest.mark.parametrize("watched", [False, True])
def test_the_log_has_the_figures_as_fields_whoever_watches(tmp_path, watched):
    out, now = io.StringIO(), [0.0]
    out.isatty = lambda: watched
    with (
        messages.heard(tmp_path / "log.jsonl", quiet=False),
        Progress(120, "train", every=30, stream=out, clock=lambda: now[0], unit="update") as progress,
    ):
        for number in range(40):
            now[0] += 2
            progress.update(1, {"padding": 0.25}, loss=float("nan") if number > 20 else 0.5)
    first, second, last = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first.pop("time") and first.pop("message").startswith("train 15/120 (12%), 0.5 update/s, 3:30 left")
    fields = {
        "at": "train",
        "done": 15,
        "total": 120,
        "per_second": 0.5,
        "seconds_left": 210,
        "padding": 0.25,
        "loss": 0.5,
    }
    assert first == {"level": "info", **fields}
    assert second["loss"] is None and last["seconds_in_all"] == 80
    assert ("train 15/120 (12%), 0.5 update/s" in out.getvalue()) != watched


def test_nothing_to_do_says_nothing():
    out = io.StringIO()
    with Progress(0, "train", stream=out):
        pass
    assert out.getvalue() == ""


class Wandb:
    """Stands for the package: keeps what it is told."""

    def __init__(self):
        self.runs, self.logged, self.finished = [], [], 0

    def init(self, **arguments):
        self.runs.append(arguments)
        return self

    def define_metric(self, name, step_metric):
        assert step_metric == name.replace("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_the_metrics_in_one_run_for_a_workdir(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (0, 1):  # a command that was repeated
        with MetricLog(tmp_path / "mine", tensorboard=False, wandb="project", config={"seed": 3}) as log:
            log.log("train", step, {"loss": 0.5, "note": "x", "norm": math.nan})
    first, second = wandb.runs
    assert first == second and first["name"] == "mine" and first["config"] == {"seed": 3} and first["resume"] == "allow"
    told = {"train/loss": 0.5, "train/note": "x", "train/norm": None}
    assert wandb.logged == [{**told, "train/step": step} for step in (0, 1)] and wandb.finished == 2


def test_without_the_package_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the package wandb"):
        MetricLog(tmp_path, wandb="project")
    MetricLog(tmp_path, wandb="project", active=False)  # all processes but the first
