"""What is looked at before the first stage: a fault of a late stage is met now, and not after hours."""

from __future__ import annotations

from collections.abc import Callable

import jax

from ctpd_jax.data.loader import steps_per_epoch
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import check_sizes, compute_on, decoder_of, folder, weights_digest
from ctpd_jax.job.outside import check_outside
from ctpd_jax.job.pairs import load_pairs, overlap_of
from ctpd_jax.job.recipe import check_loss, passes, reading, recipe
from ctpd_jax.job.score import reading_mesh
from ctpd_jax.job.table import STAGES, TRAINED, columns, left_out, models_here, trained_model
from ctpd_jax.models.hf.load import check_weights
from ctpd_jax.processes import preempt
from ctpd_jax.sharding import first_process


def preflight(job: Job, command: str) -> None:
    """Checks what a command will need, and prepares once what all processes share.

    Raises:
        UserError: what the user can mend.
    """
    # 1. Names of losses: settings.py does not know them, as it is read before JAX is there.
    for stage in TRAINED:
        check_loss(job.config, stage)

    # 2. The models: not swapped, and such that the mesh and the attention back end take them.
    if command in ("run", "sft", "dpo", "annotate", "propose"):
        in_turn(lambda: check_sizes(job), "models")
        for model in models_here(job.config):
            compute_on(job.mesh, job.config, model, decoder_of(job, model))

    # 3. The data. `train` reads the store alone, `propose` prompts.
    if command == "run":
        in_turn(lambda: check_everything(job), "data")
    elif command == "evaluate":
        in_turn(lambda: overlap_of(job), "data")  # reads both splits
    elif jax.process_count() > 1 and command not in ("train", "propose"):
        in_turn(lambda: load_pairs(job, "train"), "data")
    if command in ("run", "annotate", "propose"):
        check_readers(job)
        check_outside(job, command)


def check_everything(job: Job) -> None:
    """Meets what a late stage would meet: broken weights, a missing test set, too few pairs, a model not to train."""
    for model in models_here(job.config):
        preempt.check("the models are checked anew")
        weights_digest(job, model)
        check_weights(folder(job, model), decoder_of(job, model))
    pairs = load_pairs(job, "train")
    overlap_of(job)  # reads the test pairs too
    for stage in TRAINED:
        if not left_out(job.config, stage):
            if stage != "student_proposed":  # nobody knows yet how many pairs that will have
                steps_per_epoch(len(pairs.aligned), job.config[stage].batch_size)
            teacher = decoder_of(job, "teacher") if STAGES[stage].kind == "distill" else None
            recipe(job.config, stage, decoder_of(job, trained_model(job.config, stage)), job.mesh, teacher=teacher)


def check_readers(job: Job) -> None:
    """Meets a model that the devices which read do not divide: annotation would, after the stages that train."""
    decoders = {model: decoder_of(job, model) for model in models_here(job.config)}
    asked, mesh = columns(job.config), reading_mesh(job)
    for names in passes(job.config, decoders):
        first = asked[names[0]]
        reading(job.config, tuple(asked[name].stage for name in names), first.dtype, decoders[first.model], mesh)


def in_turn(prepare: Callable[[], object], name: str) -> None:
    """The first process prepares what all of them need; then the others do, and find on disk what it has made."""
    with preempt.apart(f"{name}: prepared once"):
        if first_process():
            prepare()
    with preempt.apart(f"{name}: prepared"):
        if not first_process():
            prepare()
