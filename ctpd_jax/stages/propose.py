"""Proposals: the student answers prompts, the teacher's contrast ranks its answers, best and worst become a pair.

So a student learns from a teacher where nobody has labelled anything: of the data only the prompts are read. What is
left in DIR/proposals are the answers, pairs.jsonl in the ordinary format, and a store like that of the annotations.

    contrast of an answer y = (log pi_high(y) - log pi_low(y)) / bytes(y)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ctpd_jax.annotate.store import shard_ranges
from ctpd_jax.artifacts import begin, canonical_json, finish, read_record, write_bytes, write_record
from ctpd_jax.errors import UserError
from ctpd_jax.job.job import Job, by_first
from ctpd_jax.job.lineage import identity
from ctpd_jax.job.models import dtype_of, text_digest, text_of
from ctpd_jax.job.pairs import PROPOSALS, PROPOSED, load_pairs, prepared, proposed
from ctpd_jax.job.table import columns
from ctpd_jax.models.sampling import generate
from ctpd_jax.processes import preempt
from ctpd_jax.report import terminal
from ctpd_jax.schema import CHOSEN, REJECTED, Counters, Message, PreferencePair
from ctpd_jax.sharding import patiently, told_by_first
from ctpd_jax.stages.annotate import measure, write
from ctpd_jax.stages.generate import reading_model
from ctpd_jax.text.columns import Reading
from ctpd_jax.text.preferences import load_prompts
from ctpd_jax.text.prompts import fit_prompt
from ctpd_jax.text.read_row import usable
from ctpd_jax.train.metrics import Progress

Prompt = tuple[Message, ...]
Answers = dict[str, bool]  # the distinct answers to a prompt, and whether each has ended its turn


def run(job: Job, stage: str) -> None:
    config, folder = job.config, job.workdir / PROPOSALS

    # 1. The prompts. Is everything done, or begun from the same things?
    prompts = prompts_of(job)
    if told_by_first(lambda: begin(folder, made_from(job, prompts))) is not None:
        job.say(f"{stage}: finished before.")
        return

    # 2. What the student answers, and what the teacher thinks of it.
    answers = dict(zip(prompts, drawn(job, prompts), strict=True))
    contrasts = ranked(job, answers)

    # 3. The pairs, in the format of the data; and from here on they are data.
    rows, left = best_and_worst(contrasts, config.propose.pairs, config.propose.min_contrast)
    counts = {"prompts": len(prompts), "distinct answers": sum(map(len, answers.values())), **left, "pairs": len(rows)}
    job.say(f"{stage}: " + ", ".join(f"{name} {number:,}" for name, number in counts.items()))
    if not rows:
        raise UserError(
            f"{stage}: no prompt has two answers that the contrast tells apart by more than propose.min_contrast="
            f"{config.propose.min_contrast:g}; raise propose.temperature or propose.answers, or lower that bound."
        )
    lines = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    by_first("the pairs are written", lambda: write_bytes(folder / PROPOSED, b"".join(lines)))

    # 4. Their store, for which every column reads them.
    own = proposed(job)
    pairs = load_pairs(own, "proposed")
    measured = measure(own, pairs, columns(own.config))
    by_first("the store of the proposals is written", lambda: write(own, pairs, measured))
    by_first("the proposals are finished", lambda: finish(folder, counts))


def prompts_of(job: Job) -> list[Prompt]:
    """The distinct prompts that the models take as they stand, in the order of the data; tells what was left out."""
    settings, data = job.config.propose, job.config.data
    spec = settings.prompts or data.train
    found, report = load_prompts(spec, data.train_split, settings.limit or None, Reading.of(data))
    # A shortened prompt would ask another question in the pairs than the student has answered.
    teacher, student = text_of(job, "teacher"), text_of(job, "student")
    most, prompts = data.max_prompt_tokens, []
    for prompt in found:
        try:
            fitted = fit_prompt(PreferencePair("", prompt, "", ""), teacher, student, most, most)
            reason = "left out: longer than data.max_prompt_tokens" if fitted.dropped else ""
        except UserError:
            reason = "left out: no prompt can be made of the messages"
        if reason:
            report.leave_out(reason, prompt[-1].content[:40] if prompt else "an empty prompt")
        else:
            prompts.append(prompt)
    job.say(f"prompts: {spec}\n  {terminal.counts(report)}")
    if not prompts:
        raise UserError(f"{spec} holds no prompt that can be answered ({report.reasons() or 'it is empty'}).")
    return prompts


def made_from(job: Job, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides the proposals beyond rounding."""
    config = job.config
    said = [[[message.role, message.content] for message in prompt] for prompt in prompts]
    settings = {name: value for name, value in config.propose.to_dict().items() if name not in ("prompts", "limit")}
    return {
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256(canonical_json(said)).hexdigest()},
        "settings": settings | {"max_response_tokens": config.data.max_response_tokens},
        "seed": config.seed,
        "compute": dtype_of(config, job.mesh),
        "answered_by": identity(job, "student_sft"),
        "texts": {model: text_digest(job, model) for model in ("teacher", "student")},
        "ranked_by": {
            name: {"params": identity(job, column.stage), "instruction": column.instruction}
            for name, column in columns(config).items()
            if name in high_and_low(config)
        },
    }


def high_and_low(config: ConfigDict) -> tuple[str, str]:
    """The columns whose log-ratio ranks."""
    weights = config.weights
    before = "reference" if weights.positive_scorer == "teacher" else "start"  # what pi+ was trained from
    alone = config.propose.contrast == "start" or weights.source == "dpo_reference"
    return "positive", before if alone else "negative"


# ------------------------------------------------------------------------------------------------ answers


def drawn(job: Job, prompts: Sequence[Prompt]) -> list[Answers]:
    """The student's answers to every prompt. Shards that are there are kept; each process draws its share of the rest.

    A shard draws with a key of its own, by its number: what was drawn before it, and by whom, does not matter.
    """
    # 1. What is missing. One process says so, as in job/score.py.
    config, times = job.config, job.config.propose.answers
    asked = [prompt for prompt in prompts for _ in range(times)]
    folder = job.workdir / PROPOSALS / "answers"
    ranges = shard_ranges(len(asked), config.propose.batch)
    paths = [folder / f"{shard:05d}.json" for shard in range(len(ranges))]
    missing = told_by_first(lambda: [shard for shard, path in enumerate(paths) if not path.exists()])
    own = missing[jax.process_index() :: jax.process_count()]

    # 2. Shard by shard.
    with preempt.apart("the answers are drawn"):
        if own:
            folder.mkdir(parents=True, exist_ok=True)
            draw, key = sampler(job), jax.random.key(config.seed)
            with Progress(len(asked), "answers", len(asked) - sum(len(ranges[n]) for n in own), "answer") as progress:
                for shard in own:
                    preempt.check("the answers that were drawn are kept")
                    part = asked[ranges[shard].start : ranges[shard].stop]
                    write_record(paths[shard], {"answers": draw(part, jax.random.fold_in(key, shard))})
                    progress.update(len(part))

    # 3. All of them, from disk, by prompt.
    said = []
    for path in paths:
        if (shard := patiently(partial(read_record, path))) is None:
            raise UserError(f"{path} is missing; the same command draws it again.")
        said += shard["answers"]
    return [dict(map(tuple, said[first : first + times])) for first in range(0, len(said), times)]


def sampler(job: Job) -> Callable[[Sequence[Prompt], jax.Array], list[tuple[str, bool]]]:
    """The student, ready to answer prompts with a random key: one answer each, and whether it has ended its turn."""
    config, text = job.config, text_of(job, "student")
    decoder, params = reading_model(job, "student_sft", job.own)
    # An answer is as long as a response may be; one that comes so far has not ended.
    most, stops = config.data.max_response_tokens, (text.end_of_turn, *decoder.eos_ids)
    temperature, dtype = config.propose.temperature, dtype_of(config, job.mesh)

    def draw(prompts: Sequence[Prompt], key: jax.Array) -> list[tuple[str, bool]]:
        ids = [text.prompt(prompt).tolist() for prompt in prompts]
        found = generate(decoder, params, ids, most, temperature, key=key, stop_ids=stops, compute_dtype=dtype)
        return [(text.tokenizer.hf.decode(each, skip_special_tokens=True), len(each) < most) for each in found]

    return draw


# ------------------------------------------------------------------------------------------------ ranking


def ranked(job: Job, answers: Mapping[Prompt, Answers]) -> dict[Prompt, dict[str, float]]:
    """The contrast of each distinct answer that can be compared, in nats per byte, by prompt.

    Answers are read as pairs of any two of a prompt, like all that models read here.
    """
    # 1. The pairs: neighbours, and the last of an odd number with the first. Blank answers say nothing.
    raw = []
    for prompt, found in answers.items():
        texts = [text for text in found if text.strip()]
        if len(texts) > 1:
            texts += texts[: len(texts) % 2]
            raw += [usable(PreferencePair("", prompt, *both)) for both in zip(texts[::2], texts[1::2])]
    contrasts: dict[Prompt, dict[str, float]] = {prompt: {} for prompt in answers}
    if not raw:
        return contrasts
    pairs = prepared(job, "answers", "the student's answers", raw, Counters())

    # 2. What both models make of them, end of turn included where it is there.
    high, low = high_and_low(job.config)
    asked = {name: column for name, column in columns(job.config).items() if name in (high, low)}
    totals = {
        name: np.array([[values.sum(dtype=np.float64) for values in both] for both in column])
        for name, column in measure(job, pairs, asked).items()
    }
    for i, pair in enumerate(pairs.aligned):
        said = pairs.raw[pair.id]
        for side, text in ((CHOSEN, said.chosen), (REJECTED, said.rejected)):
            # Closed by us and not by the student, it would teach to stop there.
            if answers[said.prompt][text] or pair.truncated[side]:
                total = float(totals[high][i, side] - totals[low][i, side])
                contrasts[said.prompt][text] = total / int(pair.response(side).bounds[-1])
    return contrasts


def best_and_worst(
    contrasts: Mapping[Prompt, Mapping[str, float]], most: int, least: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of pairs.jsonl, and which prompts give none.

    Args:
        contrasts: prompt -> answer -> its contrast, nats per byte.
        most: pairs of a prompt: the best with the worst, the second best with the second worst, and so on.
        least: by which the better one has to lead.
    """
    rows, counts = [], {"prompts without two answers to compare": 0, "prompts below min_contrast": 0}
    for prompt, found in contrasts.items():
        order = sorted(found, key=found.__getitem__)
        pairs = list(zip(order[::-1], order))[: min(most, len(order) // 2)]
        apart = [(best, worst) for best, worst in pairs if found[best] - found[worst] > least]
        counts["prompts without two answers to compare"] += not pairs
        counts["prompts below min_contrast"] += bool(pairs) and not apart
        for best, worst in apart:
            rows.append(
                {
                    "prompt": [dataclasses.asdict(message) for message in prompt] or "",
                    "chosen": best,
                    "rejected": worst,
                    "contrast_chosen": found[best],
                    "contrast_rejected": found[worst],
                }
            )
    return rows, counts
