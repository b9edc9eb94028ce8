"""STAGE.lora.base: adapters trained over a bfloat16 base, and merged into a float32 one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MICRO
from helpers.jobs import adapted, dtypes, files_of, job_in

from ctpd_jax.annotate.scorer import make_scorer, plain_item, score_pairs
from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import load_config, main
from ctpd_jax.data.loader import plan_shapes
from ctpd_jax.errors import UserError
from ctpd_jax.job import lineage, training
from ctpd_jax.job.check import check_config
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.recipe import packing, passes
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.hf import load_hf
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES
from ctpd_jax.train import loop
from ctpd_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow  # a chain of stages of its own

STAGES = ("positive", "negative", "train")
ADAPTED = [f"--config.{stage}.lora.rank=4" for stage in STAGES]
HALF = [*[f"--config.{stage}.lora.base=bfloat16" for stage in STAGES], "--config.annotate.teacher_weights=bfloat16"]
SHORT = ["--config.student_sft.steps=-1", "--config.student_dpo.steps=-1", "--config.evaluate.samples=0"]


def whole_run(workdir: Path, overrides: list[str]) -> dict[str, set[str]]:
    """Runs everything; for each stage the dtypes of the matrices that it was given frozen."""
    frozen, original = {}, loop.train

    def spy(recipe, directory, initial, lying_still, *args, **kwargs):
        leaves = jax.tree.leaves_with_path(lying_still)
        frozen[recipe.stage] = {str(leaf.dtype) for path, leaf in leaves if "norm" not in path[-2].key}
        return original(recipe, directory, initial, lying_still, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", spy)
        assert main(["run", "--config", MICRO, "--workdir", str(workdir), *overrides]) == 0
    return frozen


@pytest.fixture(scope="module")
def runs(new_workdir):
    """A run over float32 bases, one over bfloat16 ones, and what lay frozen in this one."""
    overrides, found, frozen = [*ADAPTED, *SHORT], {}, {}
    for name, more in (("float32", []), ("bfloat16", HALF)):
        workdir = new_workdir(name)
        frozen = whole_run(workdir, [*overrides, *more])
        found[name] = job_in(workdir, load_config(MICRO, [*overrides, *more]))
    return found["float32"], found["bfloat16"], frozen


def test_the_base_is_bfloat16_while_adapters_train_and_training_stays_close(runs):
    wide, half, frozen = runs
    assert frozen == {"teacher_sft": set()} | {stage: {"bfloat16"} for stage in STAGES}
    for stage in STAGES:
        a, b = (np.array([line["loss"] for line in read_metrics(run.workdir, stage)]) for run in (wide, half))
        print(f"{stage}: relative gap of the loss {np.abs(b / a - 1).max():.1e} at most")
        assert len(a) == len(b) == 4 and 0 < np.abs(b / a - 1).max() < 0.01


def test_adapters_stay_float32_and_are_merged_into_a_float32_base(runs):
    _, half, _ = runs
    for stage, model in (("positive", "teacher"), ("train", "student")):
        files = files_of(half)
        assert dtypes(files.adapters(stage)) == {"float32"}
        merged = lineage.merged(files, half.config, stage)
        base = lineage.base(files, half.config, stage, "float32").params
        assert dtypes(merged) == {"float32"}
        adapters = files.adapters(stage)["model"]["layers"]["mlp"]["up_proj"]
        scale = adapted(half, stage, model).lora.scale
        delta = scale * np.einsum("lor,lri->loi", adapters["lora_b"], adapters["lora_a"])
        before, after = (tree["model"]["layers"]["mlp"]["up_proj"]["weight"] for tree in (base, merged))
        np.testing.assert_allclose(after, before + delta, atol=1e-6)
        assert np.abs(delta).max() > 1e-4
    _, exported = load_hf(half.workdir / "export")
    jax.tree.map(np.testing.assert_array_equal, exported, lineage.merged(files_of(half), half.config, "train"))


def test_two_adapters_over_one_bfloat16_base_read_together(runs):
    _, half, _ = runs
    files = files_of(half)
    decoders = {model: files.decoder(model) for model in ("teacher", "student")}
    assert ("positive", "negative") in passes(half.config, decoders)
    store, pairs = open_store(half.workdir / "annotations", verify=False), load_pairs(half, "train").aligned[:4]
    items = [plain_item(pair, "teacher") for pair in pairs]
    spans = [tuple(pair.tokens("teacher", side).span_ids for side in (CHOSEN, REJECTED)) for pair in pairs]
    config, rows = adapted(half, "positive", "teacher"), packing(half.config, half.mesh, None)
    shapes = plan_shapes(items, [range(4)], 2, rows)
    scorer, gaps = make_scorer(config, Compute(mesh=half.mesh)), {}
    for dtype in ("bfloat16", "float32"):
        base, adapters = lineage.base(files, half.config, "positive", dtype).params, files.adapters("positive")
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf]), adapters)
        (alone,) = score_pairs(
            lambda batch, slots, base=base, stacked=stacked: scorer(stacked, base, batch, slots),
            items, spans, 2, rows, shapes,
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
