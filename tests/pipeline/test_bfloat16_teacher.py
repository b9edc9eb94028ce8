"""A teacher that reads with bfloat16 parameters: from the user's checkpoint, from a trained stage, merged, adapted."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MICRO
from helpers.jobs import dtypes, files_of, job_in

from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import load_config, main
from ctpd_jax.errors import UserError
from ctpd_jax.job import lineage
from ctpd_jax.job.models import text_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.table import left_out
from ctpd_jax.models.decoder import hidden_states, unembedding
from ctpd_jax.models.lora import merge, split
from ctpd_jax.schema import SIDES
from ctpd_jax.stages.generate import Sampling, reading_model, sample
from ctpd_jax.train.checkpoint import load_params, save_params

HALF = "--config.annotate.teacher_weights=bfloat16"
SHORT = ["--config.student_sft.steps=-1", "--config.student_dpo.steps=-1", "--config.train.steps=-1"]
# Where the teacher's parameters come from: SFT and the contrastive pair.
SOURCES = {
    "checkpoint": ["--config.weights.source=prompts", "--config.teacher_sft.steps=-1"],
    "trained": ["--config.weights.source=sft", "--config.positive.steps=2", "--config.negative.steps=2"],
    "adapters over merged ones": [
        "--config.teacher_sft.lora.rank=4", "--config.positive.lora.rank=4", "--config.negative.lora.rank=4",
    ],
}  # fmt: skip


def merged(job, stage: str):
    """The teacher that a stage left, float32 and whole."""
    return lineage.merged(files_of(job), job.config, stage)


def read(workdir: Path) -> list:
    store = open_store(workdir / "annotations", verify=False)
    return [store[i][1] for i in range(len(store))]


# The third is a chain of its own of five stages: among the slow tests.
CASES = ["checkpoint", "trained", pytest.param("adapters over merged ones", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def runs(request, new_workdir):
    """(scores with float32 parameters, scores with bfloat16 ones, the job of these)."""
    workdir = new_workdir("half")
    # The same stages: only the annotation is made twice.
    overrides = [*SHORT, *SOURCES[request.param]]
    for command in (["sft"], ["dpo"], ["dpo", "--reverse"], ["annotate"]):
        assert main([*command, "--config", MICRO, "--workdir", str(workdir), *overrides]) == 0
    exact = read(workdir)
    (workdir / "annotations").rename(workdir / "exact")
    assert main(["annotate", "--config", MICRO, "--workdir", str(workdir), *overrides, HALF]) == 0
    return exact, read(workdir), job_in(workdir, load_config(MICRO, [*overrides, HALF]))


def test_annotations_are_nearly_those_of_float32(runs):
    exact, half, _ = runs
    names = set(half[0][SIDES[0]])
    for name in sorted(names):
        gaps = np.concatenate(
            [np.abs(a[s][name] - b[s][name]) for a, b in zip(exact, half, strict=True) for s in SIDES]
        )
        print(f"{name}: mean absolute error of a span's log-probability {gaps.mean():.1e}, at most {gaps.max():.1e}")
        assert (gaps.max() == 0) == (name == "start")  # the student reads as before
        assert gaps.mean() < 0.02


def test_what_rounding_leaves_of_the_weights_is_told_where_it_takes_some(runs):
    """Of a pair that was trained whole; adapters are not rounded."""
    _, _, run = runs
    whole = not left_out(run.config, "positive") and not run.config.positive.lora.rank
    path = run.workdir / "annotations" / "rounded.json"
    assert path.exists() == whole
    assert not whole or 0.5 < json.loads(path.read_text())["correlation"] < 1


def test_parameters_are_the_float32_ones_rounded(runs):
    _, _, run = runs
    for stage in ("teacher_sft", "positive"):
        (config, half), exact = reading_model(run, stage, run.own), merged(run, stage)
        assert dtypes(exact) == {"float32"}
        adapters, base = split(half)
        assert bool(adapters) == (config.lora is not None)
        wide = [path for path, leaf in jax.tree.leaves_with_path(base) if leaf.dtype != jnp.bfloat16]
        assert all(any("norm" in key.key for key in path) for path in wide)
        if adapters:  # beside the base, where rounding cannot swallow them
            assert dtypes(adapters) == {"float32"}
            half = merge(config, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base), adapters)
        for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=2**-8 * float(np.abs(b).max()))
    assert dtypes(reading_model(run, "student_sft", run.own)[1]) == {"float32"}


def test_what_is_sampled_is_what_is_scored(runs):
    """Token by token: the likeliest one of the model that annotation reads."""
    _, _, run = runs
    config, params = reading_model(run, "positive", run.own)
    text, pairs = text_of(run, "teacher"), load_pairs(run, "train")
    prompts = [pairs.raw[pair.id].prompt for pair in pairs.aligned[:2]]
    answers = sample(text, config, params, prompts, Sampling(max_new_tokens=3), "float32")
    for prompt, answer in zip(prompts, answers):
        ids = text.prompt(prompt)
        for _ in range(3):
            hidden = hidden_states(config, params, ids[None])[0, -1]
            best = int(jnp.argmax(unembedding(config, params).astype(jnp.float32) @ hidden.astype(jnp.float32)))
            if best == text.end_of_turn or best in config.eos_ids:
                break
            ids = np.append(ids, best)
        assert answer == text.tokenizer.hf.decode(ids[len(text.prompt(prompt)) :], skip_special_tokens=True)


def test_no_wider_copy_is_read(runs, monkeypatch):
    _, _, run = runs
    trees: list = []

    def spied(original):
        def spy(*args, **kwargs):
            found = original(*args, **kwargs)
            trees.append(found[1] if isinstance(found, tuple) else found)
            return found

        return spy

    for name in ("load_hf", "load_params"):
        monkeypatch.setattr(lineage, name, spied(getattr(lineage, name)))
    reading_model(run, "positive", run.own)
    wide = [path for tree in trees for path, leaf in jax.tree.leaves_with_path(tree) if leaf.dtype != jnp.bfloat16]
    assert trees and all("lora" in path[-1].key or "norm" in path[-2].key for path in wide)


def test_float32_annotations_are_not_taken_for_bfloat16_ones(runs, capsys):
    _, _, run = runs
    arguments = ["annotate", "--config", MICRO, "--workdir", str(run.workdir), *SHORT]
    config = run.config
    arguments += [f"--config.weights.source={config.weights.source}"]
    for stage in ("teacher_sft", "positive", "negative"):
        arguments += [f"--config.{stage}.steps={config[stage].steps}"]
        arguments += [f"--config.{stage}.lora.rank={config[stage].lora.rank}"]
    assert main(arguments) == 2
    assert "weights is 'bfloat16' there and 'float32' here" in capsys.readouterr().err


def test_stored_parameters_are_rounded_only_where_that_is_asked_for(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    values = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)}
    save_params(tmp_path / "params", values)
    target = {"w": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=sharding)}
    with pytest.raises(UserError, match="float32"):
        load_params(tmp_path / "params", target)
    found = load_params(tmp_path / "params", target, cast=True)
    np.testing.assert_array_equal(found["w"], values["w"].astype(jnp.bfloat16))
    whole = {"w": jax.ShapeDtypeStruct((64, 32), jnp.int32, sharding=sharding)}
    with pytest.raises(UserError, match="int32"):
        load_params(tmp_path / "params", whole, cast=True)


def test_where_products_are_bfloat16_nothing_changes(runs):
    """Else the compute dtype of the runs here, float32, would hide what a TPU sees."""
    _, _, run = runs
    config, tokens = files_of(run).decoder("teacher"), np.arange(3, 43)[None]
    exact = merged(run, "positive")
    like = lineage.Shapes(run.config, {"teacher": config}).trained("teacher_sft", "bfloat16")
    half = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), exact, like)
    compute = jax.jit(partial(hidden_states, config, compute_dtype=jnp.bfloat16))
    # XLA would leave out the rounding of float32 weights on a CPU, whose products are float32 ones.
    options = {"xla_allow_excess_precision": False}
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact)
    a, b, c = (compute.lower(params, tokens).compile(options)(params, tokens) for params in (exact, half, rounded))
    np.testing.assert_array_equal(a, b)
    if not left_out(run.config, "positive") and not run.config.positive.lora.rank:  # its norms were trained
        assert (a != c).any()
