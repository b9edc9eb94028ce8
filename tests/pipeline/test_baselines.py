"""Baselines as stages: what their items say, and one whole run with all of them."""

from __future__ import annotations

import argparse
import json
import re
import shutil

import numpy as np
import pytest
from helpers import MICRO
from helpers.jobs import job_in, stored_params

from ctpd_jax.annotate.coefficients import padded
from ctpd_jax.annotate.store import Column
from ctpd_jax.cli import load_config, main
from ctpd_jax.core.losses import preference_loss, tis_dpo_loss
from ctpd_jax.core.weights import importance_weights
from ctpd_jax.errors import UserError
from ctpd_jax.job.check import check_config
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.plan.command import chosen
from ctpd_jax.stages.tis import tis_items
from ctpd_jax.train.metrics import read_metrics

STUDENTS = ("student_reverse", "student_tis", "student_uld", "student_ot", "student_dskd")
SETTINGS = [
    f"--config.{stage}.{setting}"
    for stage in STUDENTS
    for setting in ("steps=4", "lr=1e-3", "batch_size=8", "micro_batch=8", "save_every=2")
]


def test_tis_items_are_the_loss_of_the_papers_token_form(tmp_path):
    """What training makes of items is core.losses.tis_dpo_loss of the four models' token log-probabilities."""
    config = load_config(MICRO, [])
    pairs = load_pairs(job_in(tmp_path, config), "train").aligned[:2]
    rng = np.random.default_rng(0)

    def measured() -> list:
        sizes = [[len(pair.tokens("student", side).ids) for side in (0, 1)] for pair in pairs]
        return [tuple(rng.uniform(-3, 0, size).astype(np.float32) for size in both) for both in sizes]

    policy, start, positive, negative = columns = [measured() for _ in range(4)]
    items = tis_items(pairs, start, positive, negative, config.weights)
    for number, item in enumerate(items):
        # Padded to one length, the two responses are [1, 64] each of the four.
        sides = [[padded([column[number][side]], 64) for column in columns] for side in (0, 1)]
        real = [np.arange(64)[None] < len(policy[number][side]) for side in (0, 1)]
        weights = [importance_weights(*side[2:], mu, lower=-0.5, upper=1.5) for side, mu in zip(sides, (1.0, -1.0))]
        (best, before_chosen, *_), (worst, before_rejected, *_) = sides
        expected = tis_dpo_loss(best, worst, before_chosen, before_rejected, *weights, *real, beta=0.3)
        returns = [
            np.array([(response.weights * policy[number][side]).sum() - response.constant])
            for side, response in enumerate(item.responses)
        ]
        found = preference_loss(*returns, beta=0.3)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
        np.testing.assert_allclose(found.chosen_rewards, expected.chosen_rewards, rtol=1e-4, atol=1e-4)
        assert item.chosen.start == item.chosen.reference == pytest.approx(float(start[number][0].sum()), abs=1e-4)


@pytest.mark.slow
def test_a_run_with_baselines(finished_micro, tmp_path):
    """Each is a row of the table; a second call finds nothing to do, and CTPD is what it is without them."""
    run = shutil.copytree(finished_micro, tmp_path / "run")
    before = json.loads((run / "train" / "done.json").read_text())
    assert main(["run", "--config", MICRO, "--workdir", str(run), *SETTINGS]) == 0
    assert json.loads((run / "train" / "done.json").read_text()) == before
    assert set(STUDENTS[1:]) < set(json.loads((run / "evaluation.json").read_text())["models"])
    first = read_metrics(run, "student_tis")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-3)  # the reference is the start itself
    # The teacher's figures are what they are said to be, and the matrices of DSKD are no part of its student.
    for name in ("top128", "top50"):
        values = Column(run / "annotations", f"teacher_sft_{name}", {}, judge=False).mapped(0)
        probabilities = np.concatenate(values).reshape(-1, int(name[3:]))
        assert (np.diff(probabilities) <= 0).all() and (probabilities.sum(axis=1) <= 1 + 1e-5).all()
        assert (probabilities.sum(axis=1) > 0.2).all()
    assert read_metrics(run, "student_dskd")[0]["distill/t2s"] > 0
    assert set(stored_params(run / "student_dskd" / "params")) == set(stored_params(run / "train" / "params"))
    digests = {stage: (run / stage / "done.json").read_bytes() for stage in STUDENTS}
    assert len(set(digests.values())) == len(STUDENTS)
    written = {file: file.stat().st_mtime_ns for file in run.rglob("*.f32")}
    assert main(["run", "--config", MICRO, "--workdir", str(run), *SETTINGS]) == 0
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.f32")} == written


def test_tis_without_its_pair_is_refused(tmp_path, capsys):
    arguments = ["--config", MICRO, "--workdir", str(tmp_path), "--config.student_tis.steps=1"]
    assert main(["student_tis", *arguments]) == 2
    assert (
        "config.student_reverse.steps is -1; student_tis takes its weights from that stage" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "student_uld.teacher=student_sft",
            "config.student_uld.teacher is 'student_sft'; choose one of teacher_sft, positive",
        ),
        ("student_ot.top_k=0", "config.student_ot.top_k is 0; it has to be positive"),
        ("student_dskd.projector_lr=0.0", "config.student_dskd.projector_lr is 0.0; it has to be positive"),
    ],
)
def test_settings_of_distillation_are_checked(setting, told):
    with pytest.raises(UserError, match=re.escape(told)):
        check_config(load_config(MICRO, [f"--config.{setting}"]))


def test_a_teacher_that_is_not_trained_is_refused():
    config = load_config(MICRO, ["--config.student_uld.teacher=positive", "--config.weights.source=uniform"])
    check_config(config)  # left out, it does not matter
    config.student_uld.steps = 0
    with pytest.raises(UserError, match="this config's weights train no such teacher"):
        check_config(config)


def test_the_plan_says_what_it_leaves_out(capsys):
    config = load_config(MICRO, ["--config.student_uld.steps=1"])
    assert "student_uld" not in chosen(argparse.Namespace(stage=None), config)
    assert "student_uld: distillation is not planned" in capsys.readouterr().out
