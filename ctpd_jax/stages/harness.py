"""`ctpd evaluate --harness`: lm-eval asks models of the run, or any model folder, and writes what it found."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.job.job import Job, require
from ctpd_jax.job.models import dtype_of, folder
from ctpd_jax.job.table import left_out, rows, trained_model
from ctpd_jax.report.terminal import harness_text
from ctpd_jax.sharding import first_process
from ctpd_jax.stages.generate import reading_model


def run(job: Job, asked: argparse.Namespace) -> None:
    """Asks every model every task. All processes do the same work, and the first one writes.

    Raises:
        UserError: lm-eval is not installed; a task, its data or a model is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness needs lm-eval: pip install 'ctpd-jax[eval]', or -e '.[eval]' in a clone.")
    # 1. What would fail after hours: a task that is not there, a model that is not finished.
    shots = dict(_name_and_shots(part) for part in asked.harness.split(","))
    manager, tasks = _load_tasks(shots, asked.harness_tasks)
    table = {} if asked.folder else rows(job.config)
    chosen = [asked.folder] if asked.folder else asked.model or list(table)
    for name in chosen if table else ():
        if name not in table:
            raise UserError(f"This run has no model {name!r}; choose one of {', '.join(table)}.")
        if not left_out(job.config, table[name]):
            require(job, table[name])

    # 2. One model after the other: the devices need not hold two.
    found = {Path(name).name: _ask(job, name, table.get(name), manager, tasks, asked) for name in chosen}

    # 3. The table.
    job.say(harness_text(found, list(shots)))
    job.say(str(job.workdir / "harness"))


def _name_and_shots(part: str) -> tuple[str, int | None]:
    """Splits "gsm8k:5" at the colon; without a number the shots are the task's own, None."""
    name, _, shots = part.strip().partition(":")
    if not name or (shots and not shots.isdecimal()):
        raise UserError(f"--harness takes NAME or NAME:SHOTS, several joined by commas; {part!r} is neither.")
    return name, int(shots) if shots else None


def _load_tasks(shots: Mapping[str, int | None], directory: str | None) -> tuple[Any, list[Any]]:
    """Returns lm-eval's TaskManager, and the tasks and groups with their data and their shots."""
    from lm_eval.tasks import TaskManager

    # 1. The user's own tasks, and lm-eval's: to look through all of those takes seconds.
    manager = TaskManager(include_path=directory, include_defaults=directory is None)
    if missing := shots.keys() - set(manager.all_tasks):
        manager = TaskManager(include_path=directory)
        missing -= set(manager.all_tasks)
    if missing:
        raise UserError(f"lm-eval knows no task {', '.join(sorted(missing))}; --harness-tasks names a folder of yours.")
    # 2. Groups stay groups, for their averages; a tag is so many tasks.
    found = []
    for name, count in shots.items():
        try:
            loaded = manager.load([name])
        except Exception as error:  # data sets raise a dozen kinds, and a task's YAML any
            raise UserError(f"The task {name} cannot be loaded: {type(error).__name__}: {error}") from error
        for task in loaded["tasks"].values() if count is not None else ():
            task.set_config(key="num_fewshot", value=count)
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else list(loaded["tasks"].values())
    return manager, found


def _ask(
    job: Job, name: str, stage: str | None, manager: Any, tasks: list[Any], asked: argparse.Namespace
) -> Mapping[str, Any]:
    """Asks one model, the row `name` that `stage` left or the folder `name`; returns lm-eval's results."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from ctpd_jax.evaluate.harness import DecoderLM

    # 1. lm-eval would start processes for some intervals, by forking this one with all its threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    dtype, tracker = dtype_of(job.config, job.own), EvaluationTracker(output_path=str(job.workdir / "harness"))
    loaded = reading_model(job, stage, job.own) if stage else None
    source = folder(job, trained_model(job.config, stage)) if stage else name
    model = DecoderLM(source, asked.batch_tokens, dtype, job.own, loaded, job.config.seed)
    # 2. No torch, so no seed of it.
    job.say(f"{name}: {asked.harness}")
    results = simple_evaluate(
        model=model,
        model_args={"pretrained": name},
        tasks=tasks,
        task_manager=manager,
        limit=asked.limit,
        log_samples=asked.log_samples,
        evaluation_tracker=tracker,
        apply_chat_template=asked.chat_template,
        torch_random_seed=None,
        bootstrap_iters=1000,
    )
    samples = results.pop("samples", {})
    # 3. As lm-eval's own command writes.
    if first_process():
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, own in samples.items():
            tracker.save_results_samples(task_name=task, samples=own)
    return results["results"]
