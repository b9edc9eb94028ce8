"""CTPD of the student (arXiv 2601.11865), on what annotation has written.

The return of a response is r = sum_t a_span(t) log pi_theta(y_t) - c: the weights a come from the contrastive pair, the
constant c from the reference, and both are in the store. So no teacher is loaded here, and its folder need not be on
this machine. The loss is `train.sums.preference_sums`, its formulas are in `core.losses`.
"""

from __future__ import annotations

import hashlib

from ctpd_jax.annotate.coefficients import training_items
from ctpd_jax.annotate.store import MANIFEST, open_store
from ctpd_jax.artifacts import canonical_json, read_record
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of
from ctpd_jax.job.recipe import recipe
from ctpd_jax.job.score import training_data
from ctpd_jax.job.training import finished_before, steps_of, train_and_leave
from ctpd_jax.sharding import patiently
from ctpd_jax.stages.annotate import compared, known_without_teacher, teacher_identity, teacher_is_here


def run(job: Job, stage: str) -> None:
    config, settings = job.config, job.config[stage]

    # 1. The store, held against everything that this machine knows of what it should have been made from.
    own, folder = training_data(job, stage)
    stored = patiently(lambda: read_record(folder / MANIFEST)) or {}
    expected = known_without_teacher(own, stored)
    if teacher_is_here(config):
        expected |= teacher_identity(job)
    store = open_store(folder, expected, made_by="propose" if own is not job else "annotate")

    # 2. What is executed.
    what = recipe(config, stage, decoder_of(job, "student"), job.mesh, steps_of(config, stage, len(store)))

    # 3. Is it finished, or begun from the same things?
    weights = {name: value for name, value in config.weights.to_dict().items() if not name.endswith("_prompt")}
    annotations = hashlib.sha256(canonical_json(compared(store.manifest))).hexdigest()
    if finished_before(job, what, {"weights": weights, "annotations": annotations}):
        return

    # 4. What is learnt: the student's tokens with their weights, and one constant a response.
    items, figures = training_items(store, config.weights, settings, config.seed)

    # 5. The loop, and what later stages need.
    train_and_leave(job, what, items, figures)
