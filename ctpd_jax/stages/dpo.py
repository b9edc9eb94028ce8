"""DPO from the SFT model: `positive`, `negative` (sides swapped) and, for comparison, `student_dpo` (arXiv 2305.18290).

With weights.source = "sft" the contrastive pair is SFT instead, on the chosen and on the rejected responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctpd_jax.data.loader import plan_updates
from ctpd_jax.data.packing import in_words
from ctpd_jax.data.rows import PairItem, ScoredResponse, pair_weights
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.recipe import packing, recipe
from ctpd_jax.job.score import Measured, reference_of
from ctpd_jax.job.table import is_sft, left_out, trained_model
from ctpd_jax.job.training import finished_before, leave, parameters, steps_of
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair, Model
from ctpd_jax.stages.sft import response_items
from ctpd_jax.train.loop import train


def run(job: Job, stage: str) -> None:
    config, settings = job.config, job.config[stage]
    if left_out(config, stage):
        job.say(f"{stage}: left out.")
        return

    # 1. What is executed. Refuses here, before anything is loaded, what cannot be trained.
    model = trained_model(config, stage)
    pairs = load_pairs(job, "train")
    steps = steps_of(config, stage, len(pairs.aligned))
    what = recipe(config, stage, decoder_of(job, model), job.mesh, steps)

    # 2. What is learnt: pairs, held against what the stage's own start makes of them, or one side of them.
    if is_sft(config, stage):
        items = response_items(pairs.aligned, model, CHOSEN if stage == "positive" else REJECTED)
    else:
        reference = reference_of(job, pairs, stage)
        items = dpo_items(pairs.aligned, model, reference, swapped=stage == "negative")

    # 3. Is it finished, or begun from the same things?
    source = "sft" if is_sft(config, stage) else "dpo"
    if finished_before(job, what, {"data": pairs.identity, "model": model, "source": source}):
        return

    # 4. Which items every update sees, in rows of a few shapes.
    rows = packing(config, job.mesh)
    updates = plan_updates(items, config.seed, steps, settings.batch_size, settings.micro_batch, rows)
    job.say(f"{stage}: {in_words(updates.padding)}")

    # 5. The loop, from the newest checkpoint if there is one.
    initial, frozen = parameters(job, what)
    checkpoints = job.workdir / stage / "checkpoints"
    params = train(what, checkpoints, initial, frozen, updates, job.log, log_every=config.log_every)

    # 6. What later stages need.
    leave(job, what, params, {})


def dpo_items(pairs: Sequence[AlignedPair], model: Model, reference: Measured, swapped: bool = False) -> list[PairItem]:
    """Pairs for plain DPO: weights of one, c the reference's log-probability of the whole response."""
    items = []
    for pair, scores, weight in zip(pairs, reference, pair_weights(pairs), strict=True):
        responses = []
        for side in (CHOSEN, REJECTED):
            ids = pair.tokens(model, side).ids
            total = float(scores[side].sum(dtype=np.float64))
            responses.append(ScoredResponse(ids, np.ones(len(ids), np.float32), total, total, total))
        chosen, rejected = reversed(responses) if swapped else responses
        items.append(PairItem(pair.prompt(model), chosen, rejected, weight=weight))
    return items
