"""Supervised fine-tuning: the teacher, or the student, learns the chosen responses."""

from __future__ import annotations

from ctpd_jax.annotate.scorer import response_items
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.recipe import recipe
from ctpd_jax.job.table import trained_model
from ctpd_jax.job.training import finished_before, steps_of, train_and_leave
from ctpd_jax.schema import CHOSEN


def run(job: Job, stage: str) -> None:
    config = job.config

    # 1. What is learnt: the chosen responses.
    model = trained_model(config, stage)
    pairs = load_pairs(job, "train")
    items = response_items(pairs.aligned, model, CHOSEN)

    # 2. What is executed. Refuses here, before anything is loaded, what cannot be trained.
    steps = steps_of(config, stage, len(items))
    what = recipe(config, stage, decoder_of(job, model), job.mesh, steps)

    # 3. Is it finished, or begun from the same things?
    if finished_before(job, what, {"data": pairs.identity}):
        return

    # 4. The loop, and what later stages need.
    train_and_leave(job, what, items, {})
