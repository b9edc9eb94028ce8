"""Where a stage begins is what it is measured against: step 0 of DPO and of CTPD, for what can stand below it."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MICRO
from helpers.jobs import adapted, files_of, job_in

from ctpd_jax.annotate.coefficients import training_items
from ctpd_jax.annotate.scorer import dpo_items
from ctpd_jax.artifacts import finish
from ctpd_jax.cli import load_config
from ctpd_jax.data.rows import BatchShape, build_batch, unit_needs
from ctpd_jax.job import lineage
from ctpd_jax.job.check import check_config
from ctpd_jax.job.job import Job
from ctpd_jax.job.lineage import params_digest
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.score import reference_of, score
from ctpd_jax.job.table import base_dtype
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.decoder import init_params
from ctpd_jax.models.lora import init_adapters, join
from ctpd_jax.schema import SIDES
from ctpd_jax.train.checkpoint import save_params
from ctpd_jax.train.sums import Objective, mean_of, preference_sums

SFT = {"none": ["steps=-1"], "full": [], "adapters": ["lora.rank=3", "lora.alpha=4", "lora.targets=q_proj,up_proj"]}
HALF = ["lora.rank=4", "lora.base=bfloat16", "lora.targets=q_proj,o_proj"]
INT8 = ["lora.rank=4", "lora.base=int8", "lora.targets=q_proj,o_proj"]
BASES = {"full": [], "adapters": ["lora.rank=4"], "half": HALF, "int8": INT8}
# Of everything that can be combined, what went wrong; the rest is slow.
FEW = {("adapters", "half", "float32"), ("full", "full", "bfloat16"), ("adapters", "int8", "int8")}
CASES = [
    pytest.param(*case, id="-".join(case), marks=[] if case in FEW else pytest.mark.slow)
    for case in itertools.product(SFT, BASES, ("float32", "bfloat16", "int8"))
    # int8 has to be both, and nothing that was trained whole lies under it.
    if (case[1] == "int8") == (case[2] == "int8") and (case[0], case[1]) != ("full", "int8")
]
# Of the student nothing is read in another dtype than its base.
STUDENT = [case for case in CASES if case.values[2] == ("int8" if case.values[1] == "int8" else "float32")]


def made(tmp_path: Path, model: str, stage: str, sft: str, base: str, teacher_weights: str) -> Job:
    """A run whose `model` has an SFT behind it, of random numbers the size of a training's."""
    # Short responses: float32 rounds the sum of a long one by as much as the bounds below, on some machines.
    overrides = ["--config.data.limit=6", "--config.data.max_response_tokens=16"]
    overrides += [f"--config.annotate.teacher_weights={teacher_weights}"]
    if base == "int8":  # both of the pair, over one base
        overrides += [f"--config.negative.{setting}" for setting in INT8]
        overrides += [f"--config.positive.{setting}" for setting in INT8 if stage != "positive"]
        overrides += ["--config.teacher_sft.steps=-1"] if model == "student" else []
    overrides += [f"--config.{model}_sft.{setting}" for setting in SFT[sft]]
    overrides += [f"--config.{stage}.{setting}" for setting in BASES[base]]
    config = load_config(f"{MICRO}:pairs=16", overrides)
    check_config(config)
    run = job_in(tmp_path, config)
    name = f"{model}_sft"
    for other in {name, "student_sft"} - ({name} if sft == "none" else set()):
        owner = other.removesuffix("_sft")
        decoder = adapted(run, other, owner)
        if decoder.lora:
            moved = jax.tree.map(lambda leaf: leaf + 0.02, init_adapters(decoder, jax.random.key(1)))
        else:
            noise = init_params(decoder, jax.random.key(1))
            moved = jax.tree.map(lambda leaf, by: leaf + 0.01 * by, files_of(run).checkpoint(owner, "float32"), noise)
        save_params(tmp_path / other / "params", moved)
        finish(tmp_path / other, {"params": params_digest(moved), "steps": 4})
    return run


def first_figures(run: Job, stage: str, model: str, items: list) -> dict[str, float]:
    """What the stage would log of its first update."""
    origin = lineage.base(files_of(run), run.config, stage, base_dtype(run.config, stage))
    decoder, params = origin.decoder, origin.params
    if run.config[stage].lora.rank:
        params = join(params, init_adapters(adapted(run, stage, model), jax.random.key(0)))
    needs = np.array([unit_needs(item, "shared") for item in items])[:, 0]
    shape = BatchShape(len(items), *(-(-needs.max(axis=0) // 16) * 16).tolist())
    batch = build_batch(items, "shared", shape, len(items))
    sums = jax.jit(lambda p: preference_sums(decoder, Objective(0.3), Compute(mesh=run.mesh), p, batch)[1])(params)
    return mean_of(jax.device_get(sums))


@pytest.mark.parametrize("sft, base, teacher_weights", CASES)
def test_a_dpo_begins_at_its_reference(tmp_path, sft, base, teacher_weights):
    run = made(tmp_path, "teacher", "positive", sft, base, teacher_weights)
    pairs = load_pairs(run, "train")
    items = dpo_items(pairs.aligned, "teacher", reference_of(run, pairs, "positive"))
    figures = first_figures(run, "positive", "teacher", items)
    assert abs(figures["rewards/margins"]) <= 1e-5 and abs(figures["rewards/weighted_margins"]) <= 1e-5
    assert abs(figures["rewards/chosen"]) <= 5e-5  # no common shift either, up to float32's rounding of some 100 nats


@pytest.mark.parametrize("sft, base, teacher_weights", STUDENT)
def test_ctpd_begins_at_the_start_that_was_annotated(tmp_path, sft, base, teacher_weights):
    run = made(tmp_path, "student", "train", sft, base, teacher_weights)
    config = run.config
    config.weights.source = "random"
    config.train.reference = "student"
    pairs = load_pairs(run, "train")
    start = score(run, pairs, {"start": "student_sft"}, base_dtype(config, "train"))["start"]
    examples = [
        (pair, {side: {"start": values} for side, values in zip(SIDES, both)})
        for pair, both in zip(pairs.aligned, start, strict=True)
    ]
    figures = first_figures(run, "train", "student", training_items(examples, config.weights, config.train, 0)[0])
    assert abs(figures["rewards/margin_from_start"]) <= 1e-5 and abs(figures["rewards/weighted_margins"]) <= 1e-5
    assert "lambda/mean" in figures and figures["lambda/mean"] == pytest.approx(0.5, abs=1e-5)


def test_sft_is_kept_beside_a_bfloat16_base(tmp_path):
    """Merged into bfloat16 most of it would be rounded away; here it gives the logits that merging in float32 does."""
    run = made(tmp_path, "teacher", "positive", "adapters", "half", "float32")
    files, config = files_of(run), run.config
    layers = lineage.start(files, config, "teacher", "bfloat16").params["model"]["layers"]
    assert layers["self_attn"]["q_proj"]["weight"].dtype == jnp.bfloat16
    assert layers["self_attn"]["q_proj"]["lora_b"].dtype == jnp.float32
    origin = lineage.base(files, config, "positive", "bfloat16")
    joined = origin.params["model"]["layers"]["self_attn"]["q_proj"]
    scale = adapted(run, "positive", "teacher").lora.scale
    merged = joined["weight"].astype(jnp.float32) + scale * joined["lora_b"] @ joined["lora_a"]
    exact = lineage.merged(files, config, "teacher_sft")["model"]["layers"]["self_attn"]["q_proj"]["weight"]
    before = files.checkpoint("teacher", "float32")["model"]["layers"]["self_attn"]["q_proj"]["weight"]
    np.testing.assert_allclose(merged - before.astype(jnp.bfloat16), exact - before, atol=1e-6)
    assert set(origin.decoder.lora.targets) == {"q_proj", "o_proj", "up_proj"}
