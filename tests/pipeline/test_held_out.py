"""Held-out pairs while a stage trains: looking changes nothing, the best update is left, a stage may end early."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MICRO
from helpers.recipes import recipe_of, updates_of

from ctpd_jax.cli import load_config, main
from ctpd_jax.errors import UserError
from ctpd_jax.job.check import check_config
from ctpd_jax.processes import preempt
from ctpd_jax.schema import Batch, RowLayout
from ctpd_jax.settings import preference
from ctpd_jax.train.held_out import HeldOut
from ctpd_jax.train.loop import train
from ctpd_jax.train.metrics import MetricLog, read_metrics

LOOKS = ["--config.train.eval_every=2", "--config.train.eval_pairs=8"]


def digest(workdir: Path) -> str:
    return json.loads((workdir / "train" / "done.json").read_text())["params"]


def test_looking_changes_nothing_and_the_best_update_is_left(finished_micro, tmp_path):
    plain, run = finished_micro, shutil.copytree(finished_micro, tmp_path / "run")
    shutil.rmtree(run / "train")
    assert main(["train", "--config", MICRO, "--workdir", str(run), *LOOKS]) == 0
    assert digest(run) == digest(plain)
    lines = read_metrics(run, "train")
    seen = [line["step"] for line in lines if "eval/rewards/accuracies" in line]
    assert seen == [1, 3]
    # The start is what it is measured against: after so few updates the margin is close to nothing.
    assert 0.5 < lines[1]["eval/loss"] < 0.9 and lines[1]["eval/num_tokens"] > 0
    assert main(["train", "--config", MICRO, "--workdir", str(run)]) == 0  # looking is no setting of the result

    # What is left is the update of the largest margin, whichever that was.
    shutil.rmtree(run / "train")
    best = [*LOOKS[1:], "--config.train.eval_every=1", "--config.train.keep_best=rewards/margins"]
    assert main(["train", "--config", MICRO, "--workdir", str(run), *best]) == 0
    margins = [line["eval/rewards/margins"] for line in read_metrics(run, "train")]
    assert (digest(run) == digest(plain)) == (int(np.argmax(margins)) == 3)
    assert not (run / "train" / "best").exists()
    assert main(["train", "--config", MICRO, "--workdir", str(run)]) == 2  # but the best update is


VALUES = (3.0, 5.0, 4.0, 5.0, 4.5, 9.0)  # of the looks: the parameter counts the updates


def batch() -> Batch:
    row, zeros = np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32)
    return Batch(row, RowLayout(row, row, row), row, row, row, row, zeros, zeros, zeros, zeros, np.ones(1, np.float32))


def run_stage(folder: Path, values: Sequence[float] = VALUES, **looking) -> float:
    """Trains one number, which each update lessens by one; the look after update n finds values[n]."""
    one = jnp.ones(())

    def loss(params, batch):
        value = jnp.sum(params["model"]["norm"]["weight"])
        return value, {"loss": jnp.stack([value, one]), "num_tokens": jnp.stack([one, 0 * one])}

    def look(params, batch):
        place = jnp.round(-params["model"]["norm"]["weight"][0]).astype(int) - 1
        return one, {"rewards/margins": jnp.stack([jnp.array(values)[place], one])}

    settings = preference(lr=1.0, beta=0.1, save_every=2, warmup=0.0, weight_decay=0.0, clip=1e9)
    shapes = {"model": {"norm": {"weight": jax.ShapeDtypeStruct((1,), jnp.float32)}}}
    initial = {"model": {"norm": {"weight": jnp.zeros(1)}}}
    recipe = recipe_of(loss, shapes, settings, len(values))
    held_out = HeldOut([batch()], look, every=1, **looking)
    with MetricLog(folder, tensorboard=False) as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctpd_jax.train.loop.make_optimizer", lambda settings, steps: optax.sgd(1.0))
        updates = updates_of(lambda step: [batch()], 1)
        params = train(recipe, folder / "checkpoints", lambda: initial, {}, updates, log, held_out=held_out)
    return -float(params["model"]["norm"]["weight"][0])


@pytest.mark.parametrize(
    ("looking", "left", "looks"),
    [
        ({}, 6, 6),  # the last update
        ({"keep_best": "rewards/margins"}, 6, 6),
        ({"keep_best": "rewards/margins", "patience": 3}, 2, 5),  # an equal one later is not better
        ({"keep_best": "rewards/margins", "patience": 5}, 6, 6),
    ],
)
def test_what_is_left(tmp_path, looking, left, looks):
    assert run_stage(tmp_path, **looking) == left
    assert len(read_metrics(tmp_path)) == looks


def test_a_look_that_finds_no_number_is_never_the_best(tmp_path):
    looking = {"keep_best": "rewards/margins"}
    assert run_stage(tmp_path / "some", (math.nan, 0.1, math.inf, 0.3, math.nan), **looking) == 4
    assert run_stage(tmp_path / "none", (math.nan, -math.inf, math.nan), **looking) == 3  # the last update


def test_a_stage_that_was_stopped_keeps_and_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    asked = iter([False, False, False, True])  # before the fourth update
    monkeypatch.setattr(preempt, "stop_now", lambda: next(asked, False))
    looking = {"keep_best": "rewards/margins", "patience": 3}
    with pytest.raises(preempt.Preempted):
        run_stage(tmp_path, **looking)
    assert (tmp_path / "best").exists()
    assert run_stage(tmp_path, **looking) == 2
    assert [line["eval/rewards/margins"] for line in read_metrics(tmp_path)] == list(VALUES[:5])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep_best": "accuracy"}, "choose one of rewards/accuracies"),
        ({"keep_best": "loss"}, "config.train.eval_every is 0"),
        ({"eval_every": 5, "patience": 2}, "config.train.keep_best is ''"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    config = load_config(MICRO, [])
    config.train.update(settings)
    with pytest.raises(UserError, match=told):
        check_config(config)
