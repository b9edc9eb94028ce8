"""What every stage that trains does around its loop: is it finished, what does it begin with, what does it leave."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from ctpd_jax.annotate.scorer import dpo_items
from ctpd_jax.artifacts import begin, finish, read_record
from ctpd_jax.data.loader import micro_batches, plan_shapes, plan_updates, steps_per_epoch
from ctpd_jax.data.packing import in_words
from ctpd_jax.data.rows import PairItem
from ctpd_jax.job import lineage
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.recipe import packing
from ctpd_jax.job.score import score
from ctpd_jax.job.table import REVERSED, STAGES, base_dtype, fingerprint, left_out, profiled, starts_from
from ctpd_jax.models.decoder import Params
from ctpd_jax.models.lora import init_adapters
from ctpd_jax.sharding import barrier, first_process, told_by_first
from ctpd_jax.train.checkpoint import save_params
from ctpd_jax.train.held_out import HeldOut
from ctpd_jax.train.loop import Recipe, train
from ctpd_jax.train.metrics import read_metrics
from ctpd_jax.train.sums import Objective, preference_sums


def steps_of(config: ConfigDict, stage: str, items: int) -> int:
    """The updates of a stage: as many as the config says, or as its epochs give."""
    settings = config[stage]
    epoch = steps_per_epoch(items, settings.batch_size)
    return settings.steps or max(1, round(settings.epochs * epoch))


def finished_before(job: Job, recipe: Recipe, inputs: Mapping[str, Any]) -> bool:
    """Whether the stage is done already; else its folder is open and says what it is made from.

    Raises:
        UserError: its folder was made from other things; names the first.
    """
    stage, config, directory = recipe.stage, job.config, job.workdir / recipe.stage
    made_from = {
        "settings": fingerprint(config, stage) | {"steps": recipe.steps},
        "seed": config.seed,
        "compute": recipe.compute.dtype,
        "from": lineage.base_identity(job, stage),
        **inputs,
    }
    # These change numbers by rounding alone: noted, and told where they differ.
    noted = {"micro_batch": recipe.settings.micro_batch, "rows": config.rows.to_dict()}
    if told_by_first(lambda: begin(directory, made_from, noted, job.say)) is None:
        _say_rounded(job, recipe)
        return False
    if first_process():
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    job.say(f"{stage}: finished before.")
    return True


def _say_rounded(job: Job, recipe: Recipe) -> None:
    sft = f"{recipe.model}_sft"
    whole = recipe.stage != sft and not left_out(job.config, sft) and not job.config[sft].lora.rank
    if whole and base_dtype(job.config, recipe.stage) == "bfloat16":
        job.say(
            f"{recipe.stage}: its base is {sft}'s result rounded to bfloat16, which drops what moved an entry by less "
            f"than 0.2 %; adapters ({sft}.lora.rank) would be kept beside it."
        )


def parameters(job: Job, recipe: Recipe) -> tuple[Callable[[], Params], Params]:
    """What a stage begins with, and what lies still under it: (initial parameters when they are asked for, frozen)."""
    stage, config = recipe.stage, job.config

    def base() -> Params:
        return lineage.base(lineage.Files(job, job.mesh), config, stage, base_dtype(config, stage)).params

    if not recipe.settings.lora.rank:
        return base, {}  # read only where no checkpoint is there
    adapted = lineage.with_adapters(config, stage, decoder_of(job, recipe.model))
    return partial(init_adapters, adapted, jax.random.key(config.seed)), base()


def train_and_leave(job: Job, recipe: Recipe, items: Sequence[PairItem], figures: Mapping[str, Any]) -> None:
    """Trains a stage on its items, from its newest checkpoint if there is one, and leaves what later stages need."""
    config, settings, stage = job.config, recipe.settings, recipe.stage
    # 1. Which items every update sees, in rows of a few shapes.
    rows = packing(config, job.mesh, recipe.decoder)
    updates = plan_updates(items, config.seed, recipe.steps, settings.batch_size, settings.micro_batch, rows)
    job.say(f"{stage}: {in_words(updates.padding)}")
    # 2. What is looked at on the way.
    looked_at = held_out(job, recipe) if settings.get("eval_every") else None
    # 3. The loop.
    initial, frozen = parameters(job, recipe)
    checkpoints = job.workdir / stage / "checkpoints"
    told = figures, config.log_every, looked_at, profiled(config, stage)
    params = train(recipe, checkpoints, initial, frozen, updates, job.log, *told)
    # 4. What evaluation and later stages need.
    leave(job, recipe, params, figures)


def held_out(job: Job, recipe: Recipe) -> HeldOut:
    """The held-out pairs that a stage looks at: measured against its own start, every token counting one."""
    config, settings, stage = job.config, recipe.settings, recipe.stage
    # 1. What its start makes of them: the very column that the evaluation wants.
    pairs, start = load_pairs(job, "test"), starts_from(config, stage)
    row = STAGES[start].row
    before = score(job, pairs, {row: start}, base_dtype(config, stage))[row]
    # 2. The first of them, as this stage sees pairs.
    some = slice(settings.eval_pairs)
    items = dpo_items(pairs.aligned[some], recipe.model, before[some], swapped=stage in REVERSED)
    rows = packing(config, job.mesh, recipe.decoder)
    shapes = plan_shapes(items, [range(len(items))], settings.micro_batch, rows)
    batches = [batch for batch, _ in micro_batches(items, settings.micro_batch, rows, shapes)]
    sums = partial(preference_sums, recipe.decoder, Objective(settings.beta), recipe.compute)
    return HeldOut(batches, sums, settings.eval_every, settings.keep_best, settings.patience)


def leave(job: Job, recipe: Recipe, params: Params, figures: Mapping[str, Any]) -> None:
    """Saves what was trained, then says that the stage is finished; its checkpoints are not needed any more."""
    # The seal comes last: a kill before it leaves a stage that goes on from its newest checkpoint.
    stage, directory = recipe.stage, job.workdir / recipe.stage
    save_params(directory / "params", params, {"stage": stage, "steps": recipe.steps})
    digest = lineage.params_digest(params)
    if recipe.settings.lora.rank:  # adapters alone do not say which model this is
        before = (read_record(directory / "inputs.json") or {})["from"]
        digest = hashlib.sha256(f"{before} {digest}".encode()).hexdigest()
    if first_process():
        lines = read_metrics(job.workdir, stage)
        if skipped := sum("skipped" in line for line in lines):
            job.say(f"{stage}: {skipped} of {recipe.steps} updates were not finite and were left out.")
            figures = {**figures, "skipped": skipped}
        finish(directory, {"params": digest, "steps": recipe.steps, "told": len(lines), **figures})
        shutil.rmtree(directory / "checkpoints")
        shutil.rmtree(directory / "best", ignore_errors=True)
    barrier(f"{stage} is finished")
    job.held.keep(stage, params, together=True)
