"""DPO from the SFT model: `positive`, `negative` (sides swapped) and, for comparison, `student_dpo` (arXiv 2305.18290).

`student_reverse` is `student_dpo` with the sides swapped, which TIS-DPO of the student needs.
With weights.source = "sft" the contrastive pair is SFT instead, on the chosen and on the rejected responses.
"""

from __future__ import annotations

from ctpd_jax.annotate.scorer import dpo_items, response_items
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.recipe import recipe
from ctpd_jax.job.score import reference_of
from ctpd_jax.job.table import REVERSED, is_sft, trained_model
from ctpd_jax.job.training import finished_before, steps_of, train_and_leave
from ctpd_jax.schema import CHOSEN, REJECTED


def run(job: Job, stage: str) -> None:
    config = job.config

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
        items = dpo_items(pairs.aligned, model, reference, swapped=stage in REVERSED)

    # 3. Is it finished, or begun from the same things?
    source = "sft" if is_sft(config, stage) else "dpo"
    if finished_before(job, what, {"data": pairs.identity, "model": model, "source": source}):
        return

    # 4. The loop, and what later stages need.
    train_and_leave(job, what, items, {})
