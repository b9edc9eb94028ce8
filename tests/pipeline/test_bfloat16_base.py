"""STAGE.lora.base: adapters trained over a bfloat16 base, and merged into a float32 one."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MICRO

from ctpd_jax import stages as stages_module
from ctpd_jax.annotate.store import open_store
from ctpd_jax.annotate.teacher import make_scorer, plain_item, score_pairs
from ctpd_jax.cli import load_config, main
from ctpd_jax.data.loader import plan_shapes
from ctpd_jax.errors import UserError
from ctpd_jax.models.hf import load_hf
from ctpd_jax.run import Run
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES
from ctpd_jax.settings import check_config
from ctpd_jax.stages import read_together
from ctpd_jax.train.metrics import MetricLog, read_metrics

STAGES = ("positive", "negative", "train")
ADAPTED = [f"--config.{stage}.lora.rank=4" for stage in STAGES]
HALF = [*[f"--config.{stage}.lora.base=bfloat16" for stage in STAGES], "--config.annotate.teacher_weights=bfloat16"]
SHORT = ["--config.student_sft.steps=-1", "--config.student_dpo.steps=-1", "--config.evaluate.samples=0"]


def carry_out(commands: list[str], workdir: Path, overrides: list[str]) -> dict[str, set[str]]:
    """Runs the commands; for each stage the dtypes of the matrices that it was given frozen."""
    frozen, original = {}, stages_module.train

    def spy(name, *args, **kwargs):
        leaves = jax.tree.leaves_with_path(kwargs["frozen"] or {})
        frozen[name] = {str(leaf.dtype) for path, leaf in leaves if "norm" not in path[-2].key}
        return original(name, *args, **kwargs)

    stages_module.train = spy
    try:
        for command in commands:
            assert main([*command.split(), "--config", MICRO, "--workdir", str(workdir), *overrides]) == 0
    finally:
        stages_module.train = original
    return frozen


@pytest.fixture(scope="module")
def runs(new_workdir):
    """The training over float32 bases, a whole run over bfloat16 ones, and what lay frozen in each."""
    overrides, found, frozen = [*ADAPTED, *SHORT], {}, {}
    trained = ["sft", "dpo", "dpo --reverse", "annotate", "train"]
    for name, more, commands in (("float32", [], trained), ("bfloat16", HALF, ["run"])):
        workdir = new_workdir(name)
        if found:  # before the adapters both are the same
            shutil.copytree(found["float32"].workdir / "teacher_sft", workdir / "teacher_sft")
        frozen[name] = carry_out(commands, workdir, [*overrides, *more])
        log = MetricLog(workdir)
        found[name] = Run(load_config(MICRO, [*overrides, *more]), workdir, log, say=lambda text: None)
    yield found["float32"], found["bfloat16"], frozen
    for run in found.values():
        run.log.close()


def test_the_base_is_bfloat16_while_adapters_train_and_training_stays_close(runs):
    wide, half, frozen = runs
    assert frozen["float32"] == {"teacher_sft": set()} | {stage: {"float32"} for stage in STAGES}
    assert frozen["bfloat16"] == {stage: {"bfloat16"} for stage in STAGES}
    for stage in STAGES:
        a, b = (np.array([line["loss"] for line in read_metrics(run.workdir, stage)]) for run in (wide, half))
        print(f"{stage}: relative gap of the loss {np.abs(b / a - 1).max():.1e} at most")
        assert len(a) == len(b) == 4 and 0 < np.abs(b / a - 1).max() < 0.01


def test_adapters_stay_float32_and_are_merged_into_a_float32_base(runs):
    _, half, _ = runs
    for stage, model in (("positive", "teacher"), ("train", "student")):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.adapters(stage, model))} == {"float32"}
        merged, base = half.params_of(stage, model), half.base(stage, model)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(merged)} == {"float32"}
        adapters = half.adapters(stage, model)["model"]["layers"]["mlp"]["up_proj"]
        scale = half.trained_decoder(stage, model).lora.scale
        delta = scale * np.einsum("lor,lri->loi", adapters["lora_b"], adapters["lora_a"])
        before, after = (tree["model"]["layers"]["mlp"]["up_proj"]["weight"] for tree in (base, merged))
        np.testing.assert_allclose(after, before + delta, atol=1e-6)
        assert np.abs(delta).max() > 1e-4
    _, exported = load_hf(half.workdir / "export")
    jax.tree.map(np.testing.assert_array_equal, exported, half.params_of("train", "student"))


def test_two_adapters_over_one_bfloat16_base_read_together(runs):
    _, half, _ = runs
    assert {"positive": "positive", "negative": "negative"} in read_together(half)
    store, pairs = open_store(half.workdir / "annotations", verify=False), half.pairs("train")[:4]
    items = [plain_item(pair, "teacher") for pair in pairs]
    spans = [tuple(pair.tokens("teacher", side).span_ids for side in (CHOSEN, REJECTED)) for pair in pairs]
    config, shapes = half.trained_decoder("positive", "teacher"), plan_shapes(items, [range(4)], 2, half.rows)
    scorer, gaps = make_scorer(config, half.compute("teacher")), {}
    for dtype in ("bfloat16", "float32"):
        base, adapters = half.base("positive", "teacher", dtype), half.adapters("positive", "teacher")
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf]), adapters)
        (alone,) = score_pairs(
            lambda batch, slots, base=base, stacked=stacked: scorer(stacked, base, batch, slots),
            items, spans, 2, half.rows, shapes,
        )  # fmt: skip
        gaps[dtype] = max(
            np.abs(store[i][1][side]["positive"] - values).max()
            for i, both in enumerate(alone)
            for side, values in zip(SIDES, both)
        )
    assert gaps["bfloat16"] < 1e-4 < 1e-3 < gaps["float32"]


def test_what_cannot_be_is_refused():
    config = load_config(MICRO, [])
    config.train.lora.base = "bfloat16"
    with pytest.raises(UserError, match=r"train\.lora\.rank 0"):
        check_config(config)
    config.train.lora.update({"base": "float8", "rank": 2})
    with pytest.raises(UserError, match="choose one of float32, bfloat16"):
        check_config(config)


def test_a_stage_is_not_taken_up_over_another_base(runs, capsys):
    _, half, _ = runs
    other = [part for part in HALF if "positive" not in part]
    arguments = ["dpo", "--config", MICRO, "--workdir", str(half.workdir), *ADAPTED, *SHORT, *other]
    assert main(arguments) == 2
    assert "settings.lora.base is 'bfloat16' there and 'float32' here" in capsys.readouterr().err
