"""`ctpd inspect`: a pair as it is aligned, or how all pairs are, with weights where they are known."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ctpd_jax.annotate.coefficients import Example, SpanValues, span_values
from ctpd_jax.annotate.store import MANIFEST, Store, open_store
from ctpd_jax.artifacts import write_bytes
from ctpd_jax.errors import UserError
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import text_of
from ctpd_jax.job.pairs import Pairs, load_pairs
from ctpd_jax.report import terminal
from ctpd_jax.report.format import full_colour
from ctpd_jax.report.page import pair_page
from ctpd_jax.report.pair import Texts, pair_record, problems
from ctpd_jax.schema import MODELS, SIDES, AlignedPair, PreferencePair
from ctpd_jax.text.prepare import Limits
from ctpd_jax.text.statistics import span_statistics

BINS = 12  # of the histogram of log-ratios
CONTRAST = {"positive", "negative"}  # the scorers whose log-ratio it is


def inspect(job: Job, known: argparse.Namespace) -> None:
    """Shows what was asked for of a run's training data."""
    pairs, texts = load_pairs(job, "train"), texts_of(job)
    show(known, job.config, pairs.aligned, pairs.raw, texts, job.say, annotated(job, pairs))


def show(
    known: argparse.Namespace,
    config: ConfigDict,
    pairs: Sequence[AlignedPair],
    raw: Mapping[str, PreferencePair],
    texts: Texts,
    say: Callable[[str], None],
    store: Store | None = None,
) -> None:
    """Prints one pair or the statistics of all, and writes the page of the pair where one was asked for.

    Raises:
        UserError: there is no such pair; or, after it was shown, what is wrong with it.
    """
    # 1. All of them.
    if known.stats:
        found: dict[str, Any] = {"groups": span_statistics(pairs, raw)}
        if store is not None:
            examples = list(store)
            _, figures = span_values(examples, config.weights, config.train, config.seed)
            found["weights"] = weight_statistics(examples, figures)
        say(terminal.statistics_text(found))
        wrong = [f"pair {pair.id}: {each}" for pair in pairs for each in problems(pair, texts, Limits.of(config.data))]
        if wrong:
            raise UserError(f"{len(wrong)} faults that must not reach training; the first: {'; '.join(wrong[:3])}.")
        return
    # 2. One pair.
    place = place_of(pairs, known.pair or "0")
    annotation, weighed = None, None
    if store is not None:
        annotation = store[place]
        weighed = span_values([annotation], config.weights, config.train, config.seed, place)[0][0]
    shown = record(pairs[place], raw, texts, annotation, weighed)
    full = full_colour(config)
    say(terminal.pair_text(shown, full, colour=sys.stdout.isatty()))
    if known.html:
        known.html.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(known.html, pair_page(shown, full))
        say(str(known.html))
    if wrong := problems(pairs[place], texts, Limits.of(config.data)):
        raise UserError(f"Pair {pairs[place].id} must not reach training: {'; '.join(wrong)}.")


def place_of(pairs: Sequence[AlignedPair], wanted: str) -> int:
    """The place of a pair that was named by its number, its id or as "random".

    Raises:
        UserError: there is no such pair.
    """
    ids = [pair.id for pair in pairs]
    if wanted in ids:
        return ids.index(wanted)
    if wanted == "random":
        return random.randrange(len(pairs))
    if wanted.isdecimal() and int(wanted) < len(pairs):
        return int(wanted)
    raise UserError(f"There is no pair {wanted}; the data have {len(pairs)}, counted from 0, or give an id, or random.")


def shown_by_evaluation(job: Job) -> dict[str, Any]:
    """What the report shows of the training data: a pair, and once they are annotated how all of them are weighed."""
    pairs, texts = load_pairs(job, "train"), texts_of(job)
    store = annotated(job, pairs)
    if store is None:
        return {"example": record(pairs.aligned[0], pairs.raw, texts)}
    # Weighed all at once: each call compiles a program of its own.
    examples, config = list(store), job.config
    values, figures = span_values(examples, config.weights, config.train, config.seed)

    def one(place: int) -> dict[str, Any]:
        return record(pairs.aligned[place], pairs.raw, texts, examples[place], values[place])

    found: dict[str, Any] = {"example": one(0), "weights": weight_statistics(examples, figures)}
    if all(each[name].keys() >= CONTRAST for _, each in examples for name in SIDES):
        margins = [teacher_margin(scores) for _, scores in examples]
        found["examples"] = {"clearest": one(int(np.argmax(margins))), "least clear": one(int(np.argmin(margins)))}
    return found


def teacher_margin(scores: Mapping[str, Mapping[str, np.ndarray]]) -> float:
    """log pi+ / pi- of the chosen response less that of the rejected one, nats."""
    chosen, rejected = (float((scores[name]["positive"] - scores[name]["negative"]).sum()) for name in SIDES)
    return chosen - rejected


def record(
    pair: AlignedPair,
    raw: Mapping[str, PreferencePair],
    texts: Texts,
    annotation: Example | None = None,
    weighed: tuple[SpanValues, SpanValues] | None = None,
) -> dict[str, Any]:
    """One pair with its scores and weights, where they are known."""
    weights = None if weighed is None else (weighed[0].weights, weighed[1].weights)
    return pair_record(pair, raw[pair.id], texts, weights, None if annotation is None else annotation[1])


def annotated(job: Job, pairs: Pairs) -> Store | None:
    """The store of the run's training data; None before they were annotated.

    Raises:
        UserError: it was made from other data.
    """
    folder = job.workdir / "annotations"
    return open_store(folder, {"data": pairs.identity}) if (folder / MANIFEST).exists() else None


def texts_of(job: Job) -> Texts:
    return {model: text_of(job, model) for model in MODELS}


def weight_statistics(examples: Sequence[Example], figures: Mapping[str, float]) -> dict[str, Any]:
    """How the weights are spread over the spans: shares at their bounds, and the histogram of the log-ratio."""
    shares = {name: figures[f"weights/{name}"] for name in ("clipped_low", "clipped_high")}
    found: dict[str, Any] = {"shares": {name.replace("_", " "): share for name, share in shares.items()}}
    scores = [each[name] for _, each in examples for name in SIDES]
    if all(each.keys() >= CONTRAST for each in scores):
        ratios = np.concatenate([each["positive"] - each["negative"] for each in scores])
        low, high = np.quantile(ratios, [0.005, 0.995])
        # A few outliers would make one bar of all the others.
        counts, edges = np.histogram(np.clip(ratios, low, high), BINS)
        found |= {"histogram": (counts / counts.sum()).tolist(), "edges": edges.tolist()}
    return found
