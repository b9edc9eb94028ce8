"""`ctpd inspect`: one training pair as it is aligned, with its weights where they are known."""

from __future__ import annotations

import dataclasses
from typing import Any

from ctpd_jax.annotate.coefficients import span_values
from ctpd_jax.annotate.store import MANIFEST, open_store
from ctpd_jax.errors import UserError
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import text_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.report import terminal
from ctpd_jax.report.format import pieces
from ctpd_jax.schema import SIDES


def inspect(job: Job, number: int) -> None:
    job.say(terminal.example_text(example(job, number)))


def example(job: Job, number: int) -> dict[str, Any]:
    """One training pair, as JSON holds it: the text of every span, both sides' tokens in it, and its weight.

    Raises:
        UserError: there is no such pair, or the store was made from other data.
    """
    config, pairs = job.config, load_pairs(job, "train")
    if not 0 <= number < len(pairs.aligned):
        raise UserError(f"There is no pair {number}; the training data has {len(pairs.aligned)}, counted from 0.")
    pair, folder, weights = pairs.aligned[number], job.workdir / "annotations", None
    if (folder / MANIFEST).exists():
        store = open_store(folder, {"data": pairs.identity}, verify=False)
        weights = span_values([store[number]], config.weights, config.train, config.seed, first=number)[0][0]
    # Weights are there once the pairs were annotated; the alignment is there before anything was trained.
    raw = pairs.raw[pair.id]
    sides = {}
    for side, name in enumerate(SIDES):
        aligned, text = pair.response(side), (raw.chosen, raw.rejected)[side].encode("utf-8")
        spans = []
        for i in range(aligned.num_spans):
            spans.append(
                {
                    "text": text[aligned.bounds[i] : aligned.bounds[i + 1]].decode("utf-8", errors="replace"),
                    "teacher": pieces(text_of(job, "teacher").tokenizer, aligned.teacher, i),
                    "student": pieces(text_of(job, "student").tokenizer, aligned.student, i),
                    "weight": None if weights is None else float(weights[side].weights[i]),
                }
            )
        sides[name] = {"spans": spans, "truncated": pair.truncated[side]}
    return {"id": pair.id, "source": raw.source, "prompt": [dataclasses.asdict(m) for m in raw.prompt], **sides}
