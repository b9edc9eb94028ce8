"""TIS-DPO of the student with a contrastive pair of its own (arXiv 2410.04350, without its optional KL term).

`student_dpo` and `student_reverse` say how much each of the student's tokens carries the preference, and the student's
start is the reference: core.losses.tis_dpo_loss in its token form. No teacher and no span takes part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from ctpd_jax.core.weights import importance_weights
from ctpd_jax.data.rows import PairItem, ScoredResponse, pair_weights
from ctpd_jax.job.job import Job
from ctpd_jax.job.lineage import identity
from ctpd_jax.job.models import decoder_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.recipe import recipe
from ctpd_jax.job.score import Measured, score
from ctpd_jax.job.table import base_dtype, reading_dtype
from ctpd_jax.job.training import finished_before, steps_of, train_and_leave
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair

POSITIVE, NEGATIVE = "student_dpo", "student_reverse"


def run(job: Job, stage: str) -> None:
    config = job.config

    # 1. What is executed.
    pairs = load_pairs(job, "train")
    steps = steps_of(config, stage, len(pairs.aligned))
    what = recipe(config, stage, decoder_of(job, "student"), job.mesh, steps)

    # 2. What is learnt: three models of the student read every token once.
    dtypes = {
        "student_sft": base_dtype(config, stage),  # the reference is the very start of the policy
        POSITIVE: reading_dtype(config, "student"),
        NEGATIVE: reading_dtype(config, "student"),
    }
    read = {one: score(job, pairs, {f"{one}_tokens": one}, dtype, by_token=True) for one, dtype in dtypes.items()}
    start, positive, negative = (read[one][f"{one}_tokens"] for one in dtypes)
    items = tis_items(pairs.aligned, start, positive, negative, config.weights)

    # 3. Is it finished, or begun from the same things?
    weights = {name: config.weights[name] for name in ("mu", "k", "lower", "upper")}
    pair = {"positive": identity(job, POSITIVE), "negative": identity(job, NEGATIVE)}
    if finished_before(job, what, {"data": pairs.identity, "weights": weights, **pair}):
        return

    # 4. The loop, and what later stages need.
    train_and_leave(job, what, items, {})


def tis_items(
    pairs: Sequence[AlignedPair], start: Measured, positive: Measured, negative: Measured, weights: ConfigDict
) -> list[PairItem]:
    """The student's items: each token with its weight w_t, each response with c = sum_t w_t log pi_start(y_t).

    Args:
        start, positive, negative: log-probabilities of every token, float32 [T] of each response.
        weights: its mu, k, lower and upper.
    """
    # All tokens of all responses in one array: a ragged response has no shape to compile for.
    sizes = [len(values) for both in start for values in both]
    better, worse = (np.concatenate([values for both in column for values in both]) for column in (positive, negative))
    sides = np.repeat(np.tile([weights.mu, -weights.mu], len(pairs)), sizes).astype(np.float32)
    found = importance_weights(better, worse, sides, weights.k, weights.lower, weights.upper)
    own = iter(np.split(np.asarray(found), np.cumsum(sizes)[:-1]))

    def response(pair: AlignedPair, side: int, before: np.ndarray) -> ScoredResponse:
        w, logps = next(own), before.astype(np.float64)
        total = float(logps.sum())
        return ScoredResponse(pair.tokens("student", side).ids, w, float((w * logps).sum()), total, total)

    items = []
    for pair, both, weight in zip(pairs, start, pair_weights(pairs), strict=True):
        chosen, rejected = (response(pair, side, both[side]) for side in (CHOSEN, REJECTED))
        items.append(PairItem(pair.student_prompt, chosen, rejected, weight=weight, id=pair.id))
    return items
