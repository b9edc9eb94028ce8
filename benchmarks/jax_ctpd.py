"""Our side of train_step.py, which starts it: an update of `ctpd train`, or `ctpd annotate` and `ctpd train` whole.

python jax_ctpd.py GIVEN.json        # then a line of JSON for every answer:
{"run": "prepare", "to": "torch.json", "epoch": false}
{"run": "update"}
{"run": "epoch"}
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from torch_ctpd import serve

from ctpd_jax.annotate.coefficients import Example, span_values, training_items
from ctpd_jax.annotate.scorer import plain_item
from ctpd_jax.data.loader import batch_indices, micro_batches, plan_updates, steps_per_epoch
from ctpd_jax.job.job import Job, open_job
from ctpd_jax.job.models import decoder_of
from ctpd_jax.job.pairs import Pairs, load_pairs
from ctpd_jax.job.recipe import packing, recipe
from ctpd_jax.job.score import score
from ctpd_jax.job.training import parameters, steps_of
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.schema import CHOSEN, MODELS, REJECTED, SIDES, AlignedPair
from ctpd_jax.settings import default_config
from ctpd_jax.sharding import place_batch
from ctpd_jax.stages import annotate, train
from ctpd_jax.train.loop import init_state
from ctpd_jax.train.sums import mean_of


def config_of(given: Mapping[str, Any]) -> ConfigDict:
    """The default settings, and nothing else but what the comparison is about."""
    config = default_config()
    config.teacher.path, config.student.path = given["teacher"], given["student"]
    config.data.train, config.train.batch_size = given["data"], given["batch_size"]
    # The contrastive pair is the teacher itself: reading with it costs the same, and nothing is trained for it.
    config.positive.steps = config.negative.steps = -1
    config.update_from_flattened_dict(given["settings"])
    return config


def first_update(job: Job) -> tuple[Pairs, Pairs]:
    """All pairs, and those of the first update."""
    config, pairs = job.config, load_pairs(job, "train")
    places = batch_indices(config.seed, 0, len(pairs.aligned), config.train.batch_size)
    return pairs, dataclasses.replace(pairs, aligned=[pairs.aligned[place] for place in places])


def examples_of(job: Job, pairs: Pairs) -> list[Example]:
    """The pairs with the teacher for reference, and for a contrastive pair two models that are made up."""
    draw, examples = np.random.default_rng(0), []
    # Read once, by `prepare`: a process that trains finds them on disk and never holds the teacher.
    reference = score(job, pairs, {"reference": "teacher_sft"}, "float32")["reference"]
    for pair, both in zip(pairs.aligned, reference, strict=True):
        scores = {}
        for side, own in zip(SIDES, both):
            positive = own + draw.normal(0.2, 0.6, len(own)).astype(np.float32)
            scores[side] = {"reference": own, "start": own, "negative": own, "positive": positive}
        examples.append((pair, scores))
    return examples


# ------------------------------------------------------------------------------------------------ for torch


def prepare(job: Job, to: str, epoch: bool) -> dict[str, Any]:
    """Writes the pairs for torch, those of the first update weighed; returns the useful work on them."""
    config, (everything, own) = job.config, first_update(job)
    size = config.train.batch_size
    if epoch:
        count = len(everything.aligned)
        steps = range(steps_per_epoch(count, size))
        updates = [batch_indices(config.seed, step, count, size).tolist() for step in steps]
        pairs, responses = everything.aligned, [{}, {}] * count
    else:
        updates, pairs, examples = [list(range(size))], own.aligned, examples_of(job, own)
        values = span_values(examples, config.weights, config.train, config.seed)[0]
        responses = [
            {"weights": both[side].weights.tolist(), "reference": scores[name]["reference"].tolist()}
            for both, (_, scores) in zip(values, examples)
            for side, name in enumerate(SIDES)
        ]
    given = {name: config.train[name] for name in ("beta", "lr", "weight_decay", "clip")}
    given |= {"teacher": config.teacher.path, "student": config.student.path, "updates": updates}
    given |= {"bounds": [config.weights.lower, config.weights.upper]}
    given["pairs"] = [record(pair, both) for pair, both in zip(pairs, zip(responses[::2], responses[1::2]))]
    Path(to).write_text(json.dumps(given), encoding="utf-8")
    trained = [pairs[place] for places in updates for place in places]
    return {"pairs": len(trained), **useful_work(job, trained)}


def record(pair: AlignedPair, both: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    responses = []
    for side, known in zip((CHOSEN, REJECTED), both):
        tokens = {model: pair.tokens(model, side) for model in MODELS}
        ids = {model: tokens[model].ids.tolist() for model in MODELS}
        spans = {f"{model}_spans": tokens[model].span_ids.tolist() for model in MODELS}
        responses.append({**ids, **spans, **known})
    return {"prompts": {model: pair.prompt(model).tolist() for model in MODELS}, "responses": responses}


def useful_work(job: Job, pairs: Sequence[AlignedPair]) -> dict[str, Any]:
    """Six operations for each entry of a layer's matrices and token, and of the head and scored token."""
    decoder = decoder_of(job, "student")
    entries = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(decoder)["model"]["layers"]))
    scored = sum(len(pair.tokens("student", side).ids) for pair in pairs for side in (CHOSEN, REJECTED))
    tokens = scored + sum(2 * len(pair.prompt("student")) for pair in pairs)
    operations = 6 * (entries * tokens + decoder.vocab_size * decoder.hidden_size * scored)
    return {"tokens": tokens, "scored": scored, "useful_gflop": operations / 1e9}


# ------------------------------------------------------------------------------------------------ what is measured


def update_of(job: Job) -> Callable[[], dict[str, Any]]:
    """The first update of `ctpd train`, again and again: its data, its programs, and what its loop does with them."""
    # 1. The batches of the update, in the shapes that a stage over all pairs has.
    config, (everything, pairs) = job.config, first_update(job)
    settings, rows = config.train, packing(config, job.mesh, decoder_of(job, "student"))
    views = [plain_item(pair, "student") for pair in everything.aligned]
    steps, size = steps_of(config, "train", len(views)), settings.batch_size
    planned = plan_updates(views, config.seed, steps, size, settings.micro_batch, rows)
    examples = examples_of(job, pairs)
    items, _ = training_items(examples, config.weights, settings, config.seed)
    batches = [batch for batch, _ in micro_batches(items, planned.micro_batch, rows, planned.shapes)]
    print("rows, length:", *(batch.tokens.shape for batch in batches), file=sys.stderr)

    # 2. The programs, as train.loop.train has them.
    what = recipe(config, "train", decoder_of(job, "student"), job.mesh, steps)
    initial, frozen = parameters(job, what)
    where = jax.tree.map(lambda leaf: leaf.sharding, what.state)
    begin = jax.jit(lambda params: init_state(params, what.optimizer), out_shardings=where)
    accumulate, update = what.programs()
    state = begin(initial())
    gradient = jax.tree.map(jnp.zeros_like, state.params)

    def run() -> dict[str, Any]:
        nonlocal state, gradient
        sums: dict[str, jax.Array] = {}
        for batch in batches:
            gradient, new = accumulate(state.params, frozen, gradient, place_batch(job.mesh, batch))
            sums = {key: value + sums.get(key, 0.0) for key, value in new.items()}
        state, gradient, norm = update(state, gradient, sums["loss"][1])
        jax.block_until_ready(state)
        means = mean_of(jax.device_get(sums))
        return {"loss": means["loss"], "padding": means["padding"], "grad_norm": float(norm)}

    return run


def epoch(job: Job) -> dict[str, Any]:
    """`ctpd annotate` and `ctpd train`, with what they write."""
    start = time.perf_counter()
    annotate.run(job, "annotate")
    annotated = time.perf_counter()
    train.run(job, "train")
    parts = {"annotation": annotated - start, "training": time.perf_counter() - annotated}
    lines = map(json.loads, (job.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    own = [line for line in lines if line["stage"] == "train"]
    return {"loss": own[0]["loss"], "padding": float(np.mean([line["padding"] for line in own])), **parts}


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config, workdir = config_of(given), Path(given["workdir"])
    with open_job(config, workdir, lambda text: None, given["looks_only"]) as job:
        update = lru_cache(lambda: update_of(job))
        runs = {"prepare": lambda **asked: prepare(job, **asked), "epoch": lambda: epoch(job)}
        serve(runs | {"update": lambda: update()()})


if __name__ == "__main__":
    main()
