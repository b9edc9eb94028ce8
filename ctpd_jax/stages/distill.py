"""Logit distillation of the chosen responses, for comparison: ULD, Multi-Level OT and DSKD (docs/method.md, Baselines).

The teacher reads them once and leaves what is needed on disk (job/features.py). DSKD trains matrices between the two
models' spaces beside the student; they are dropped when it is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from ctpd_jax.annotate.scorer import response_items
from ctpd_jax.data.loader import plan_updates
from ctpd_jax.data.packing import round_up
from ctpd_jax.job.features import Features, one_response_a_row, teacher_features
from ctpd_jax.job.job import Job
from ctpd_jax.job.lineage import identity
from ctpd_jax.job.models import decoder_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.recipe import packing, recipe
from ctpd_jax.job.table import profiled
from ctpd_jax.job.training import finished_before, leave, parameters, steps_of
from ctpd_jax.models.decoder import Params
from ctpd_jax.schema import CHOSEN, Batch
from ctpd_jax.train.distill import init_projectors
from ctpd_jax.train.loop import train


def run(job: Job, stage: str) -> None:
    config, settings = job.config, job.config[stage]

    # 1. What is executed.
    pairs, student, teacher = load_pairs(job, "train"), decoder_of(job, "student"), decoder_of(job, "teacher")
    items = response_items(pairs.aligned, "student", CHOSEN)
    steps = steps_of(config, stage, len(items))
    what = recipe(config, stage, student, job.mesh, steps, teacher=teacher)

    # 2. Is it finished, or begun from the same things?
    if finished_before(job, what, {"data": pairs.identity, "taught_by": identity(job, settings.teacher)}):
        return

    # 3. What the teacher says. More probabilities than the larger vocabulary has are none.
    k = min(settings.get("top_k", 0), max(student.vocab_size, teacher.vocab_size))
    features = teacher_features(job, pairs, settings.teacher, k)

    # 4. Which responses every update sees, one a row, with the teacher's tokens beside them: as many a row as the
    # longest response has, so that the whole stage has one shape of them.
    rows = one_response_a_row(packing(config, job.mesh, student))
    size = int(round_up(max(map(len, features.of_pairs)), rows.multiple))

    def beside(batch: Batch, places: Sequence[int]) -> Batch:
        return features.beside(batch, pairs.aligned, places, size)

    updates = plan_updates(items, config.seed, steps, settings.batch_size, settings.micro_batch, rows, beside)
    job.say(f"{stage}: {updates.padding:.0%} of the tokens in rows are padding; a row is one response here.")

    # 5. The loop, from the newest checkpoint if there is one.
    initial, frozen = parameters(job, what)

    def begin() -> Params:
        shapes = what.trainable.get("projectors", {})
        drawn = {"projectors": init_projectors(shapes, jax.random.key(config.seed))} if shapes else {}
        return initial() | drawn

    with_teacher = frozen | teacher_head(features, what.frozen)
    checkpoints = job.workdir / stage / "checkpoints"
    params = train(
        what, checkpoints, begin, with_teacher, updates, job.log, None, config.log_every, None, profiled(config, stage)
    )

    # 6. What evaluation needs.
    leave(job, what, {name: value for name, value in params.items() if name != "projectors"}, {})


def teacher_head(features: Features, frozen: Params) -> Params:
    """The teacher's unembedding on the devices where the recipe wants it; {} for methods that do without."""
    if features.head is None:
        return {}
    head, where = np.asarray(features.head), frozen["teacher"]["lm_head"]["weight"].sharding
    placed = jax.make_array_from_callback(head.shape, where, lambda index: head[index])
    return {"teacher": {"lm_head": {"weight": placed}}}
