"""Numbers that are not finite, and data that vanish, in a run: each ends it with a sentence, and nothing is spoilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import MICRO

from ctpd_jax.annotate import coefficients
from ctpd_jax.cli import load_config, main
from ctpd_jax.job import score
from ctpd_jax.train.metrics import read_metrics


def digest(workdir: Path) -> str:
    return json.loads((workdir / "train" / "done.json").read_text())["params"]


@pytest.fixture
def untrained(finished_micro, tmp_path) -> Path:
    """A run whose student is still to be trained."""
    run = shutil.copytree(finished_micro, tmp_path / "run")
    shutil.rmtree(run / "train")
    return run


def test_a_pair_that_is_not_finite_is_named_and_can_be_left_out(untrained, monkeypatch, capsys):
    """A weight of the store spoilt in memory: no checkpoint, no parameters; then without the updates that see it."""
    made, spoilt = coefficients.training_items, []

    def spoil(*given):
        items, figures = made(*given)
        chosen = items[5].chosen
        spoilt.append(items[5].id)
        chosen.weights[0] = np.inf
        return items, figures

    monkeypatch.setattr("ctpd_jax.stages.train.training_items", spoil)
    arguments = ["train", "--config", MICRO, "--workdir", str(untrained), "--config.train.steps=6"]
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"by themselves are not finite: {spoilt[0]}. Lower train.lr" in said
    assert not (untrained / "train" / "params").exists()
    # Six updates of eight are an epoch: the pair is in one of them.
    assert main([*arguments, "--config.train.nonfinite=skip", "--config.train.save_every=1"]) == 0
    assert "train: 1 of 6 updates were not finite and were left out." in capsys.readouterr().out
    lines = read_metrics(untrained, "train")
    assert [line["step"] for line in lines] == list(range(6))
    assert sum("skipped" in line for line in lines) == 1
    assert json.loads((untrained / "train" / "done.json").read_text())["skipped"] == 1
    assert main(["status", "--workdir", str(untrained)]) == 0
    assert "finished, 6 updates, 1 of them left out" in capsys.readouterr().out


def test_leaving_out_is_no_other_training_where_nothing_is_left_out(untrained, finished_micro):
    assert main(["train", "--config", MICRO, "--workdir", str(untrained), "--config.train.nonfinite=skip"]) == 0
    assert digest(untrained) == digest(finished_micro)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_log_probability_that_is_not_finite_is_not_stored(finished_micro, tmp_path, monkeypatch, capsys, value):
    run, measured = shutil.copytree(finished_micro, tmp_path / "run"), score.score_pairs
    shutil.rmtree(run / "annotations")

    def spoil(*given):
        found = measured(*given)
        chosen, rejected = found[0][3]
        found[0][3] = chosen, np.append(rejected[:-1], np.float32(value))  # a shard's fourth pair, its last span
        return found

    monkeypatch.setattr(score, "score_pairs", spoil)
    assert main(["annotate", "--config", MICRO, "--workdir", str(run)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "reference: a log-probability of pair " in said and "is not finite. Look at the model in" in said
    assert not list((run / "annotations").rglob("*.f32"))
    monkeypatch.undo()
    assert main(["annotate", "--config", MICRO, "--workdir", str(run)]) == 0
    for path in Path(finished_micro).glob("annotations/*.array_record*"):
        assert (run / "annotations" / path.name).read_bytes() == path.read_bytes()


def test_data_that_vanish_in_the_middle_are_named_and_the_run_goes_on_when_they_are_back(untrained, tmp_path, capsys):
    source = Path(load_config(MICRO, []).data.train)
    data, away = tmp_path / "pairs.jsonl", tmp_path / "away.jsonl"
    shutil.copy(source, data)
    arguments = ["--config", MICRO, "--workdir", str(untrained), f"--config.data.train={data}"]
    shutil.rmtree(untrained / "annotations" / "columns" / "positive")
    (untrained / "annotations" / "manifest.json").unlink()
    data.rename(away)
    assert main(["annotate", *arguments]) == 2
    assert str(data) in capsys.readouterr().err
    away.rename(data)
    assert main(["annotate", *arguments]) == 0
    data.rename(away)
    assert main(["train", *arguments]) == 0  # the store has all that it learns from
    assert digest(untrained)
