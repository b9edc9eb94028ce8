"""The preference pairs of a job, ready for both models."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ml_collections import ConfigDict

from ctpd_jax.errors import UserError
from ctpd_jax.job import prepared as on_disk
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of, folder, source_of, text_digest, text_of
from ctpd_jax.job.table import models_here
from ctpd_jax.report import terminal
from ctpd_jax.report.format import overlap_line
from ctpd_jax.schema import CHOSEN, MODELS, REJECTED, AlignedPair, Counters, Model, PreferencePair
from ctpd_jax.settings import default_config
from ctpd_jax.sharding import first_process
from ctpd_jax.text.columns import Reading
from ctpd_jax.text.parallel import prepare_in_processes, workers_for
from ctpd_jax.text.preferences import load_preferences, overlap, require_kept
from ctpd_jax.text.prepare import BATCH, RULES, Limits, prepare_pairs
from ctpd_jax.train.metrics import Progress

# Proposals are two splits more: any two answers of a prompt, to be ranked, and the best and the worst of each.
Split = Literal["train", "test", "answers", "proposed"]
PROPOSALS = "proposals"  # their folder in the workdir, and the file of the pairs in it
PROPOSED = "pairs.jsonl"
MANY = 4 * BATCH  # pairs: so many take long enough for a progress bar


@dataclass(frozen=True)
class Pairs:
    """One split of the data."""

    split: Split
    raw: dict[str, PreferencePair]  # as they came, by id
    aligned: Sequence[AlignedPair]  # tokenized for both models and cut into spans, in the order of the source
    identity: dict[str, Any]  # the examples in their order, and how they were cut


@lru_cache(maxsize=4)  # a run asks for the same two splits in every stage
def load_pairs(job: Job, split: Split) -> Pairs:
    """Reads, tokenizes, aligns and checks a split, and tells what was left out.

    Raises:
        UserError: no source, too few usable rows, or pairs that a model cannot take.
    """
    data = job.config.data
    spec, name = (data.test, data.test_split) if split == "test" else (data.train, data.train_split)
    limit = data.test_limit if split == "test" else data.limit
    if not spec:
        raise UserError(f"config.data.{split} is empty; give FILE.jsonl, tfds:NAME or hf:NAME.")
    return prepared(job, split, spec, *load_preferences(spec, name, limit or None, reading=Reading.of(data)))


def prepared(job: Job, split: Split, spec: str, raw: list[PreferencePair], report: Counters) -> Pairs:
    """Tokenizes, aligns and checks pairs that were read from `spec`, and tells what `report` and it have left out."""
    # 1. Both tokenizations, cut where they agree: from the workdir, where the same were prepared before.
    data, limits = job.config.data, Limits.of(job.config.data)
    if split == "answers":  # each is measured by itself, whatever answer it stands beside
        limits = dataclasses.replace(limits, end_of_turn_both=False)
    models = text_of(job, "teacher"), text_of(job, "student")
    made = {"limits": dataclasses.asdict(limits), "rules": RULES, "texts": on_disk.digest(raw)}
    made |= {model: text_digest(job, model) for model in MODELS}

    def prepare() -> tuple[list[AlignedPair], Counters]:
        seen = first_process() and len(raw) >= MANY
        with Progress(len(raw), f"{split}: tokenized and aligned", unit="pair", active=seen) as progress:
            if (workers := workers_for(len(raw))) > 1:
                sources = source_of(job, "teacher"), source_of(job, "student")
                return prepare_in_processes(raw, sources, models, limits, workers, progress.update)
            return prepare_pairs(raw, *models, limits, progress.update)

    writes = first_process() and not job.looks_only
    aligned, counters = on_disk.prepared_once(job.workdir / "prepared" / split, made, prepare, writes)
    report.merge(counters)

    # 2. What became of the rows, in a file and on the screen, before anything refuses them.
    first = {"first": report.notes} if report.notes else {}
    job.note(f"data_{split}.json", {"source": spec, **report.counts, **first})
    job.say(f"{split}: {spec}\n  {terminal.counts(report)}")
    require_kept(report, len(aligned), f"{split}: {spec}", data.min_kept)
    for model in models_here(job.config):
        _check_ids(job, split, model, aligned)
    return Pairs(split, {pair.id: pair for pair in raw}, aligned, _identity(job, aligned, limits))


@lru_cache(maxsize=2)  # what is loaded for a job is kept by the job
def proposed(job: Job) -> Job:
    """The job as it were if its training data were its proposals, and its `train` the student that learns from them."""
    config = ConfigDict(job.config.to_dict() | {"train": job.config.student_proposed.to_dict()})
    # The file is our own: nothing of how the user's rows are read is for it.
    config.data.update(
        {
            name: default_config().data[name]
            for name in ("train_split", "limit", "columns", "ignore", "ranked", "strip_template")
        }
    )
    config.data.update({"train": str(job.workdir / PROPOSALS / PROPOSED), "min_kept": 0.0})
    return dataclasses.replace(job, config=config)


def _check_ids(job: Job, split: str, model: Model, pairs: Sequence[AlignedPair]) -> None:
    """Holds the token ids against the model: JAX would read past the end of a table without a word."""
    # Both checks together: they look at the same arrays, and there may be a hundred thousand pairs.
    decoder = decoder_of(job, model)
    for pair in pairs:
        prompt, sides = pair.prompt(model), [pair.tokens(model, side).ids for side in (CHOSEN, REJECTED)]
        largest = max(int(ids.max()) for ids in (prompt, *sides))
        length = len(prompt) + max(map(len, sides))
        if largest >= decoder.vocab_size:
            raise UserError(
                f"The {model}'s tokenizer gives id {largest}, its model in {folder(job, model)} has "
                f"{decoder.vocab_size} embeddings: tokenizer and weights do not belong together."
            )
        if length > decoder.longest:
            raise UserError(
                f"{split} pair {pair.id} has {length} {model} tokens, the model takes {decoder.longest}: "
                "lower config.data.max_prompt_tokens or config.data.max_response_tokens."
            )


def _identity(job: Job, aligned: Sequence[AlignedPair], limits: Limits) -> dict[str, Any]:
    """What identifies the prepared pairs."""
    ids = hashlib.sha256("\n".join(pair.id for pair in aligned).encode()).hexdigest()
    worth = [(pair.weight, pair.margin) for pair in aligned]
    told = any(weight != 1 or margin is not None for weight, margin in worth)
    return {
        **({"worth": hashlib.sha256(repr(worth).encode()).hexdigest()} if told else {}),
        "examples": ids,
        "count": len(aligned),
        "max_prompt_tokens": limits.prompt,
        "max_response_tokens": limits.response,
        "unit": limits.unit,
        "end_of_turn": limits.end_of_turn,
        "end_of_turn_both": limits.end_of_turn_both,
        "rules": RULES,
        "teacher": text_digest(job, "teacher"),
        "student": text_digest(job, "student"),
    }


@lru_cache(maxsize=2)
def overlap_of(job: Job) -> dict[str, float]:
    """Which shares of the test pairs and of their prompts are in the training data too; told once."""
    found = overlap(list(load_pairs(job, "train").raw.values()), list(load_pairs(job, "test").raw.values()))
    job.say(overlap_line(found))
    return found
