"""Evaluation: every model scores the held-out pairs and answers their prompts -> evaluation.json, report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import numpy as np

from ctpd_jax.artifacts import kept, read_record, write_record
from ctpd_jax.evaluate.accuracy import compare
from ctpd_jax.job.job import Job, by_first
from ctpd_jax.job.lineage import identity
from ctpd_jax.job.models import dtype_of, text_of
from ctpd_jax.job.pairs import Pairs, load_pairs, overlap_of
from ctpd_jax.job.score import Measured, reads_together, score
from ctpd_jax.job.table import TRAINED, reading_dtype, row_starts, rows, trained_model
from ctpd_jax.report import terminal
from ctpd_jax.report.page import write_report
from ctpd_jax.schema import CHOSEN, REJECTED, Message
from ctpd_jax.stages.generate import Sampling, reading_model, sample
from ctpd_jax.stages.inspect import shown_by_evaluation
from ctpd_jax.text.prepare import Limits
from ctpd_jax.train.metrics import read_metrics

SHOWN = 6  # answers of each model in the report; the others are in evaluation/samples/


def run(job: Job, stage: str) -> None:
    config, pairs = job.config, load_pairs(job, "test")

    # 1. Every model reads the held-out pairs; all processes together.
    columns: dict[str, Measured] = {}
    for row, left_by in rows(config).items():
        columns |= score(job, pairs, {row: left_by}, reading_dtype(config, trained_model(config, left_by)))

    # 2. Answers and numbers; one process.
    by_first("the evaluation is written", lambda: write(job, pairs, columns))


def write(job: Job, pairs: Pairs, columns: Mapping[str, Measured]) -> None:
    """What every model made of the held-out pairs -> evaluation.json, report.html, and the table."""
    config, table = job.config, rows(job.config)

    # 1. Accuracies, margins and lambda, from the log-probabilities of whole responses.
    logps = {
        name: np.array([[scores.sum(dtype=np.float64) for scores in both] for both in column])
        for name, column in columns.items()
    }
    found: dict[str, Any] = compare(
        logps,
        covered=np.array([[pair.response(side).bounds[-1] for side in (CHOSEN, REJECTED)] for pair in pairs.aligned]),
        lengths=np.array([[pair.chosen_bytes, pair.rejected_bytes] for pair in pairs.aligned]),
        starts=row_starts(config),
        students=[row for row, stage in table.items() if trained_model(config, stage) == "student"],
        teacher="teacher",
        betas={row: beta_of(job, stage) for row, stage in table.items()},
        tolerance=config.evaluate.length_tolerance,
    )

    # 2. The data they were measured on.
    cuts = [sum(pair.truncated) for pair in pairs.aligned]
    found["pairs"] = len(pairs.aligned)
    found["data"] = {
        "in_train": overlap_of(job),
        "one_side_cut": cuts.count(1),
        "both_cut": cuts.count(2),
        "end_of_turn": Limits.of(config.data).where_one_is_cut,
    }

    # 3. Answers, the course of training, and pairs to look at.
    found["samples"] = {row: samples(job, pairs, row)[:SHOWN] for row in table}
    found["training"] = {}
    for stage in TRAINED:
        if not stage.endswith("_sft") and (lines := read_metrics(job.workdir, stage)):
            found["training"][stage] = {"first": lines[0], "last": lines[-1]}
    found |= shown_by_evaluation(job)

    # 4. Into files and onto the screen.
    plain = as_plain(found)
    write_record(job.workdir / "evaluation.json", plain)
    write_report(job.workdir)
    job.say(terminal.pair_text(plain["example"]))
    job.say(terminal.evaluation_text(plain))
    job.say(f"{job.workdir / 'evaluation.json'}, and a page: {job.workdir / 'report.html'}")


def beta_of(job: Job, stage: str) -> float:
    """The beta that a stage was trained with; CTPD's for a model that was not trained on pairs."""
    for name in (stage, "train"):
        trained = read_record(job.workdir / name / "inputs.json") or {}
        if "beta" in trained.get("settings", {}):
            return trained["settings"]["beta"]
    return job.config.train.beta


def samples(job: Job, pairs: Pairs, row: str) -> list[dict[str, str]]:
    """Answers of one model to the held-out prompts in turn; kept until the model or the settings change."""
    config, stage = job.config, rows(job.config)[row]
    model = trained_model(config, stage)
    settings, compute = config.evaluate, dtype_of(config, job.mesh)
    if reads_together(job) and model == "teacher":  # no process alone holds it
        return []
    # 1. Were they drawn before, by this very model?
    inputs = {
        "params": identity(job, stage),
        "data": pairs.identity,
        "count": settings.samples,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "weights": reading_dtype(config, model),
        "compute": compute,
        "seed": config.seed,
    }
    path = job.workdir / "evaluation" / "samples" / f"{row}.json"
    if known := kept(path, {"inputs": inputs}):
        return known["samples"]
    # As many as asked for, from the first prompt on, and round again where there are fewer.
    asked = list(islice(cycle(prompts_of(pairs)), settings.samples))
    sampling = Sampling(settings.max_new_tokens, settings.temperature, seed=config.seed)
    answers = sample(text_of(job, model), *reading_model(job, stage, job.own), asked, sampling, compute)
    drawn = [{"prompt": prompt[-1].content, "answer": answer} for prompt, answer in zip(asked, answers)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, {"inputs": inputs, "samples": drawn})
    return drawn


def prompts_of(pairs: Pairs) -> list[tuple[Message, ...]]:
    """Each prompt that was not shortened once, in the order of the data."""
    whole = [pairs.raw[pair.id].prompt for pair in pairs.aligned if not pair.dropped]
    return list(dict.fromkeys(whole))


def as_plain(value: Any) -> Any:
    """The value as JSON holds it; a figure that does not exist is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: as_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [as_plain(part) for part in value]
    if isinstance(value, np.generic):
        return as_plain(value.item())
    return None if isinstance(value, float) and not np.isfinite(value) else value
