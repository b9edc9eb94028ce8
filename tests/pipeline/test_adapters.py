"""A run whose stages train adapters."""

import shutil

import jax
import numpy as np
import pytest
from helpers import ADAPTED, MICRO
from helpers.jobs import stored_params
from helpers.peft_folder import load_peft
from toy import world_on_disk

from ctpd_jax.annotate.scorer import make_scorer, plain_item, score_pairs
from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import main
from ctpd_jax.data.loader import plan_shapes
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.hf import load_hf
from ctpd_jax.models.lora import merge, with_lora
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES
from ctpd_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def workdir(adapted_micro, tmp_path_factory):
    return shutil.copytree(adapted_micro, tmp_path_factory.mktemp("adapters") / "run")


def load_base(workdir, stage):
    """The config and the parameters that a stage began with: the user's checkpoint, SFT merged into the teacher's."""
    if stage in ("positive", "negative"):
        return load_merged(workdir, "teacher_sft")
    world = world_on_disk()
    return load_hf(world.student if stage == "train" else world.teacher)


def load_merged(workdir, stage):
    """The config without adapters, and the parameters that a stage left with its adapters merged."""
    config, base = load_base(workdir, stage)
    return config, merge(with_lora(config, 4, 16.0), base, stored_params(workdir / stage / "params"))


@pytest.mark.parametrize("stage", ["teacher_sft", "positive", "train"])
def test_only_adapters_are_trained_and_kept(workdir, stage):
    stored = stored_params(workdir / stage / "params")
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(stored)}
    assert names == {"lora_a", "lora_b"}
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(stored))  # B has left zero
    assert len(read_metrics(workdir, stage)) == 4
    (_, merged), (_, base) = load_merged(workdir, stage), load_base(workdir, stage)
    after, before = (tree["model"]["layers"]["mlp"]["up_proj"]["weight"] for tree in (merged, base))
    assert np.abs(after - before).max() > 0
    np.testing.assert_array_equal(merged["model"]["norm"]["weight"], base["model"]["norm"]["weight"])


def test_training_starts_at_the_base(workdir):
    first = read_metrics(workdir, "positive")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4) and first["rewards/margins"] == pytest.approx(
        0, abs=1e-3
    )


def test_two_adapters_read_together_as_two_merged_models_read_alone(workdir):
    store, rows = open_store(workdir / "annotations", verify=False), PackingConfig("shared", buckets=1)
    pairs = [store[i][0] for i in range(6)]
    items = [plain_item(pair, "teacher") for pair in pairs]
    spans = [tuple(pair.tokens("teacher", side).span_ids for side in (CHOSEN, REJECTED)) for pair in pairs]
    differ = 0.0
    for name in ("positive", "negative"):
        config, params = load_merged(workdir, name)
        scorer = make_scorer(config, Compute())
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


def test_the_export_is_base_and_adapters_merged(workdir):
    _, exported = load_hf(workdir / "export")
    jax.tree.map(np.testing.assert_array_equal, exported, load_merged(workdir, "train")[1])


def test_adapters_are_exported_for_peft(workdir):
    overrides = [*ADAPTED, "--config.export.adapters=True"]
    assert main(["export", "--config", MICRO, "--workdir", str(workdir), *overrides]) == 0
    plain = load_base(workdir, "train")[0]
    config, adapters = load_peft(workdir / "adapters", plain)
    assert config.lora == with_lora(plain, 4, 16.0).lora
    jax.tree.map(np.testing.assert_array_equal, adapters, stored_params(workdir / "train" / "params"))


def test_other_settings_than_the_adapters_were_trained_with_are_refused(workdir, capsys):
    """Another alpha would fit their shapes, and count them another number of times."""
    overrides = [*ADAPTED, "--config.train.lora.alpha=64"]
    assert main(["export", "--config", MICRO, "--workdir", str(workdir), *overrides]) == 2
    assert "alpha is 16.0 there and 64.0 here" in capsys.readouterr().err


def test_adapters_need_the_users_own_checkpoint_as_base(workdir, capsys):
    sft = [setting for setting in ADAPTED if "student_sft" not in setting]
    overrides = [*sft, "--config.export.adapters=True"]
    assert main(["export", "--config", MICRO, "--workdir", str(workdir), *overrides]) == 2
    assert "student_sft" in capsys.readouterr().err


def test_an_unknown_target_is_refused_before_anything_is_trained(tmp_path, capsys):
    arguments = ["run", "--config", MICRO, "--workdir", str(tmp_path), "--config.train.lora.rank=4"]
    assert main([*arguments, "--config.train.lora.targets=qkv"]) == 2
    assert "qkv" in capsys.readouterr().err and not (tmp_path / "positive").exists()


INT8 = [f"--config.{stage}.lora.{setting}" for stage in ("positive", "negative") for setting in ("rank=4", "base=int8")]
SCORES = [f"--config.weights.{side}_scorer=student" for side in ("positive", "negative")]
OVER_INT8 = ["--config.train.lora.base=int8", "--config.student_sft.steps=-1"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["--config.annotate.teacher_weights=int8", "--config.teacher_sft.steps=-1"],
            "config.positive.lora.base is 'float32'; the teacher reads in",
        ),
        (INT8, "config.positive.lora.base is 'int8'; the teacher reads in annotate.teacher_weights='float32'"),
        ([*INT8, "--config.annotate.teacher_weights=int8"], "config.teacher_sft.lora.rank is 0; only adapters can lie"),
        (["--config.train.lora.rank=4", "--config.train.lora.base=int8"], "config.student_sft.lora.rank is 0; only"),
        (["--config.train.lora.base=int8"], "without adapters (train.lora.rank 0) parameters train in float32"),
        (["--config.train.lora.base=int4"], "choose one of float32, bfloat16, int8"),
        # The student that scores reads in float32: its pair is no int8, nor the start that it is held against.
        ([*INT8, *SCORES], "config.positive.lora.base is 'int8'; the student reads in float32"),
        (
            [*SCORES, "--config.train.lora.rank=4", *OVER_INT8, "--config.weights.source=dpo_reference"],
            "config.train.lora.base is 'int8'; the student's contrastive pair reads in float32",
        ),
    ],
)
def test_an_int8_model_is_held_against_itself_alone(tmp_path, capsys, settings, sentence):
    assert main(["run", "--config", MICRO, "--workdir", str(tmp_path), *settings]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_over_int8_bases(tmp_path):
    """Teacher and student; the reference is what the DPO began with, and the export opens as always."""
    settings = [*INT8, "--config.annotate.teacher_weights=int8", "--config.teacher_sft.lora.rank=4"]
    settings += ["--config.train.lora.rank=4", "--config.train.lora.base=int8", "--config.student_sft.steps=-1"]
    assert main(["run", "--config", MICRO, "--workdir", str(tmp_path), *settings, "--config.student_dpo.steps=-1"]) == 0
    first = read_metrics(tmp_path, "positive")[0]
    assert abs(first["rewards/margins"]) < 1e-5 and first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(read_metrics(tmp_path, "train")[0]["rewards/margin_from_start"]) < 1e-5
    assert open_store(tmp_path / "annotations").manifest["settings"]["scorers"]["reference"]["weights"] == "int8"
    config, params = load_hf(tmp_path / "export")
    assert not config.int8 and {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
