"""A run whose stages train adapters."""

import jax
import numpy as np
import pytest
from helpers import MICRO
from helpers.jobs import adapted, files_of, job_in
from helpers.peft_folder import load_peft

from ctpd_jax.annotate.scorer import make_scorer, plain_item, score_pairs
from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import load_config, main
from ctpd_jax.data.loader import plan_shapes
from ctpd_jax.job import lineage
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.recipe import packing
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.hf import load_hf
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES
from ctpd_jax.train.checkpoint import load_params
from ctpd_jax.train.metrics import read_metrics

ADAPTED = [f"--config.{stage}.lora.rank=4" for stage in ("teacher_sft", "positive", "negative", "train")]
SMALL = ["--config.student_sft.steps=-1", "--config.student_dpo.steps=-1"]


@pytest.fixture(scope="module")
def run(new_workdir):
    """A whole run with adapters, as the job that sees it."""
    workdir = new_workdir("adapters")
    overrides = [*ADAPTED, *SMALL]
    assert main(["run", "--config", MICRO, "--workdir", str(workdir), *overrides]) == 0
    return job_in(workdir, load_config(MICRO, overrides))


def test_only_adapters_are_trained_and_kept(run):
    for stage, model in (("teacher_sft", "teacher"), ("positive", "teacher"), ("train", "student")):
        stored, _ = load_params(run.workdir / stage / "params")
        names = {path[-1].key for path, _ in jax.tree.leaves_with_path(stored)}
        assert names == {"lora_a", "lora_b"}
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(stored))  # B has left zero
        assert len(read_metrics(run.workdir, stage)) == 4
        merged, base = (
            lineage.merged(files_of(run), run.config, stage, model),
            lineage.base(files_of(run), run.config, stage, "float32").params,
        )
        after, before = (tree["model"]["layers"]["mlp"]["up_proj"]["weight"] for tree in (merged, base))
        assert np.abs(after - before).max() > 0
        np.testing.assert_array_equal(merged["model"]["norm"]["weight"], base["model"]["norm"]["weight"])


def test_training_starts_at_the_base(run):
    first = read_metrics(run.workdir, "positive")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4) and first["rewards/margins"] == pytest.approx(
        0, abs=1e-3
    )


def test_two_adapters_read_together_as_two_merged_models_read_alone(run):
    store, pairs = open_store(run.workdir / "annotations", verify=False), load_pairs(run, "train").aligned[:6]
    items = [plain_item(pair, "teacher") for pair in pairs]
    spans = [tuple(pair.tokens("teacher", side).span_ids for side in (CHOSEN, REJECTED)) for pair in pairs]
    differ, decoder, rows = 0.0, files_of(run).decoder("teacher"), packing(run.config, run.mesh)
    for name in ("positive", "negative"):
        scorer, params = (
            make_scorer(decoder, Compute(mesh=run.mesh)),
            lineage.merged(files_of(run), run.config, name, "teacher"),
        )
        (alone,) = score_pairs(
            lambda batch, slots, scorer=scorer, params=params: scorer({}, params, batch, slots),
            items, spans, 2, rows, plan_shapes(items, [range(len(items))], 2, rows),
        )  # fmt: skip
        for i, both in enumerate(alone):
            for side, values in zip(SIDES, both):
                scores = store[i][1][side]
                np.testing.assert_allclose(scores[name], values, atol=1e-4)
                differ = max(differ, np.abs(values - scores["reference"]).max())
    assert differ > 1e-2  # the adapters do something


def test_the_export_is_base_and_adapters_merged(run):
    _, exported = load_hf(run.workdir / "export")
    jax.tree.map(np.testing.assert_array_equal, exported, lineage.merged(files_of(run), run.config, "train", "student"))


def test_adapters_are_exported_for_peft(run):
    overrides = [*ADAPTED, *SMALL, "--config.export.adapters=True"]
    assert main(["export", "--config", MICRO, "--workdir", str(run.workdir), *overrides]) == 0
    config, adapters = load_peft(run.workdir / "adapters", files_of(run).decoder("student"))
    assert config.lora == adapted(run, "train", "student").lora
    jax.tree.map(np.testing.assert_array_equal, adapters, files_of(run).adapters("train"))


def test_other_settings_than_the_adapters_were_trained_with_are_refused(run, capsys):
    """Another alpha would fit their shapes, and count them another number of times."""
    overrides = [*ADAPTED, *SMALL, "--config.train.lora.alpha=64"]
    assert main(["export", "--config", MICRO, "--workdir", str(run.workdir), *overrides]) == 2
    assert "alpha is 16.0 there and 64.0 here" in capsys.readouterr().err


def test_adapters_need_the_users_own_checkpoint_as_base(run, capsys):
    overrides = [*ADAPTED, "--config.export.adapters=True", "--config.student_dpo.steps=-1"]
    assert main(["export", "--config", MICRO, "--workdir", str(run.workdir), *overrides]) == 2
    assert "student_sft" in capsys.readouterr().err


def test_an_unknown_target_is_refused_before_anything_is_trained(tmp_path, capsys):
    arguments = ["run", "--config", MICRO, "--workdir", str(tmp_path), "--config.train.lora.rank=4"]
    assert main([*arguments, "--config.train.lora.targets=qkv"]) == 2
    assert "qkv" in capsys.readouterr().err and not (tmp_path / "positive").exists()


def test_int8_is_refused_with_the_reason(tmp_path, capsys):
    arguments = ["run", "--config", MICRO, "--workdir", str(tmp_path), "--config.annotate.teacher_weights=int8"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "annotate.teacher_weights" in error and "reference" in error and "bfloat16" in error
