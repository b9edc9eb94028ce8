"""What was measured -> what the training step needs: one weight per student token, one constant per response.

This happens when the store is read, so another mu, clip, transform or reference needs no new annotation.

Letters: N responses; S spans of a response and T student tokens, padded to a few sizes, so that few programs are
compiled.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ctpd_jax.core.arrays import masked_sum_and_count
from ctpd_jax.core.losses import Normalize, reward_coefficients
from ctpd_jax.core.objectives import pair_labels, span_targets, sure_weights
from ctpd_jax.core.projection import project_to_tokens
from ctpd_jax.core.weights import (
    agreeing_weights,
    binary_weights,
    importance_weights,
    mean_one_weights,
    random_weights,
    rank_weights,
    scale_weights,
    threshold_weights,
    uniform_weights,
    weight_diagnostics,
)
from ctpd_jax.data.rows import PairItem, ScoredResponse
from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES, Aligned, AlignedPair, Array

Scores = Mapping[str, np.ndarray]  # scorer -> float32 [S]
Example = tuple[AlignedPair, Mapping[str, Scores]]  # a pair, and per side the scores of its response

PAIRS = 4096  # in memory at a time, with all that was measured of them
ROWS = 512  # responses in a program: what it holds on the device is bounded
REFERENCES = {"teacher": "reference", "student": "start", "none": None}


def span_weights(
    positive: Array, negative: Array, mask: Array, mu: Array, keys: Array, weights: ConfigDict
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """Returns the weights float32 [N, S] of padded responses, and their diagnostics as (sum, count)."""
    # 1. Where the weights come from.
    if weights.source == "uniform":
        values = uniform_weights(mask)
    elif weights.source == "random":
        values = random_weights(keys, mask)
    else:
        values = importance_weights(positive, negative, mu[:, None], weights.k, weights.lower, weights.upper, mask=mask)
    # 2. A transform of them, one at most.
    if weights.transform == "threshold":
        values = threshold_weights(values, mask=mask)
    elif weights.transform == "scale":
        values = scale_weights(values, mask=mask)
    elif weights.transform == "rank":
        values = rank_weights(values, mask=mask)
    elif weights.transform == "binary":
        values = binary_weights(values, 100 * weights.top_share, mask=mask)
    elif weights.transform == "mean_one":
        values = mean_one_weights(values, mask=mask)
    elif weights.transform == "agree":
        values = agreeing_weights(values, weights.k, mask=mask)
    return values, weight_diagnostics(positive, negative, values, weights.lower, weights.upper, mask=mask)


def padded(
    rows: Sequence[np.ndarray], size: int, dtype: type = np.float32, fill: int = 0, count: int = 0
) -> np.ndarray:
    """Stacks ragged rows: [max(N, count), size], `fill` behind and below them."""
    out: np.ndarray = np.full((max(len(rows), count), size), fill, dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def padded_size(count: int, smallest: int = 32) -> int:
    """The power of two that a row is padded to."""
    return max(smallest, 1 << (count - 1).bit_length())


def by_size(counts: Sequence[int]) -> dict[int, list[int]]:
    """Groups places by the size that their count is padded to."""
    groups: dict[int, list[int]] = {}
    for place, count in enumerate(counts):
        groups.setdefault(padded_size(count), []).append(place)
    return groups


@dataclass(frozen=True)
class SpanValues:
    """What one response's spans count for: w_i, and a, c of r = sum_t a_span(t) log pi(y_t) - c."""

    weights: np.ndarray  # float32 [S], w_i
    token_weights: np.ndarray  # float32 [T], a_span(t) of the student's tokens
    constant: float  # c
    start: float  # log pi_start of the response, every span counting one; NaN where the start was not measured
    reference: float  # log pi_ref, likewise; 0 without a reference
    targets: np.ndarray | None = None  # float32 [S], core.objectives.span_targets, where the objective has them


def span_values(
    examples: Iterable[Example], weights: ConfigDict, train: ConfigDict, seed: int, first: int = 0
) -> tuple[list[tuple[SpanValues, SpanValues]], dict[str, float]]:
    """Returns the values of every pair's chosen and rejected spans, and the diagnostics of the weights.

    `first` is the place of the first example in the data: random weights are drawn by place.

    `train.normalize = "start"` (margin relative to the student's start) is the student's start as reference: the other
    reference cancels from that margin.
    """
    totals: Totals = {}
    values = [both for _, both in _weighed(examples, weights, train, seed, first, totals)]
    return values, _figures(totals)


Totals = dict[str, np.ndarray]  # name -> float64 [2]: sum and count


def _figures(totals: Totals) -> dict[str, float]:
    return {f"weights/{name}": float(total / max(count, 1)) for name, (total, count) in totals.items()}


def _weighed(
    examples: Iterable[Example], weights: ConfigDict, train: ConfigDict, seed: int, first: int, totals: Totals
) -> Iterator[tuple[AlignedPair, tuple[SpanValues, SpanValues]]]:
    """Yields every pair with its values, a few thousand at a time in memory, and adds the diagnostics to `totals`."""
    # Where the teacher is followed span by span, it is not the reference besides.
    followed = train.objective in ("regression", "mixed")
    reference = "start" if followed or train.normalize == "start" else REFERENCES[train.reference]
    normalize: Normalize = "none" if train.normalize == "start" else train.normalize

    contrastive = weights.source not in ("uniform", "random")
    before = "reference" if weights.positive_scorer == "teacher" else "start"  # what pi+ was trained from
    opposite = before if weights.source == "dpo_reference" else "negative"
    other = before if train.contrast == "start" else opposite

    @jax.jit
    def measure(scores: Scores, student: Array, teacher: Array, sizes: Array, side: Array, places: Array) -> tuple:
        # `student` and `teacher` count the tokens of each span, `sizes` its bytes.
        mask, mu = student > 0, jnp.where(side == CHOSEN, weights.mu, -weights.mu)
        zeros = jnp.zeros(mask.shape)
        positive, negative = (scores["positive"], scores[opposite]) if contrastive else (zeros, zeros)
        keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(seed), place))(places)
        w, diagnostics = span_weights(positive, negative, mask, mu, keys, weights)

        # The method: core turns weights and reference into one number a token and one a response.
        summed, counts = scores[reference] if reference else None, teacher if reference == "reference" else student
        a, constant = reward_coefficients(w, student, summed, counts, sizes, train.span_logprob, normalize)

        # What objectives beyond the paper's follow.
        targets = None
        if followed:
            targets = span_targets(scores["start"], positive, scores[other], train.tau, train.target_clip)

        # What is logged beside it: whole responses, every token counting one.
        plain = jnp.zeros_like(constant) if summed is None else jnp.where(mask, summed, 0).sum(axis=-1)
        start = jnp.where(mask, scores["start"], 0).sum(axis=-1) if "start" in scores else jnp.full_like(plain, jnp.nan)
        for number, name in enumerate(SIDES):
            diagnostics[name] = masked_sum_and_count(w, mask & (side == number)[:, None])
        return (w, a, targets, constant, start, plain), diagnostics

    project = jax.jit(project_to_tokens)
    coming = iter(examples)
    while some := list(itertools.islice(coming, PAIRS)):
        responses = [(pair.response(s), scores[name], s) for pair, scores in some for s, name in enumerate(SIDES)]
        out: list[SpanValues | None] = [None] * len(responses)
        # Responses of one padded size go through the program together: one compilation for each size.
        groups = by_size([aligned.num_spans for aligned, _, _ in responses]).items()
        for size, places in ((size, group[i : i + ROWS]) for size, group in groups for i in range(0, len(group), ROWS)):
            part, count = [responses[i] for i in places], min(ROWS, padded_size(len(places)))
            below = count - len(part)
            found, diagnostics = measure(
                {name: padded([s[name] for _, s, _ in part], size, count=count) for name in part[0][1]},
                padded([np.bincount(aligned.student.span_ids) for aligned, _, _ in part], size, np.int32, count=count),
                padded([np.bincount(aligned.teacher.span_ids) for aligned, _, _ in part], size, np.int32, count=count),
                padded([np.diff(aligned.bounds) for aligned, _, _ in part], size, np.int32, count=count),
                np.pad(np.array([side for _, _, side in part], np.int32), (0, below)),
                np.pad(np.array(places, np.uint32) + np.uint32(2 * first), (0, below)),
            )
            # The projection is a program of its own: in `measure` it would change how XLA fuses, and so rounds, c.
            w, a, targets, *sums = found
            longest = padded_size(max(len(aligned.student.ids) for aligned, _, _ in part))
            span_ids = padded([aligned.student.span_ids for aligned, _, _ in part], longest, np.int32, -1, count)
            w, of_tokens, targets, *sums = jax.device_get((w, project(a, span_ids), targets, *sums))
            for row, place in enumerate(places):
                aligned = responses[place][0]
                # Copies, since a part of an array keeps all of it in memory.
                own_weights = w[row, : aligned.num_spans].copy()
                token_weights = of_tokens[row, : len(aligned.student.ids)].copy()
                own = None if targets is None else targets[row, : aligned.num_spans].copy()
                constant, start, plain = (float(each[row]) for each in sums)
                out[place] = SpanValues(own_weights, token_weights, constant, start, plain, own)
            for name, (total, number) in jax.device_get(diagnostics).items():
                totals[name] = totals.get(name, 0) + np.array([total, number], np.float64)
        whole = [value for value in out if value is not None]
        yield from zip((pair for pair, _ in some), zip(whole[::2], whole[1::2], strict=True), strict=True)
        first += len(some)


def training_items(
    examples: Iterable[Example], weights: ConfigDict, train: ConfigDict, seed: int
) -> tuple[list[PairItem], dict[str, float]]:
    """Returns the student's items for CTPD, and figures about spans and weights that every log line repeats.

    Of the examples only what the student learns from is kept in memory.
    """

    def response(aligned: Aligned, value: SpanValues) -> ScoredResponse:
        spans = (None, None) if value.targets is None else (aligned.student.span_ids, value.targets)
        ids, weights = aligned.student.ids, value.token_weights
        return ScoredResponse(ids, weights, value.constant, value.start, value.reference, *spans)

    # 1. Pair by pair: tokens, weights and constants, and what the data say that the pair is worth.
    totals: Totals = {}
    items, worth, counted = [], [], np.zeros(6, np.int64)
    with _no_collection():
        for pair, both in _weighed(examples, weights, train, seed, 0, totals):
            sides = response(pair.chosen, both[CHOSEN]), response(pair.rejected, both[REJECTED])
            items.append(PairItem(pair.student_prompt, *sides, id=pair.id))
            worth.append((pair.id, pair.weight, pair.margin))
            counted += _spans_of(pair)

    # 2. What depends on all of them: by how much the chosen response has to lead, labels and weights.
    lead, labels, of_pairs = margin_values(worth, train)
    if lead.any():  # it lowers the chosen response's return
        chosen = [replace(i.chosen, constant=i.chosen.constant + float(x)) for i, x in zip(items, lead, strict=True)]
        items = [item._replace(chosen=own) for item, own in zip(items, chosen)]
    if labels is not None:
        items = [item._replace(label=float(label)) for item, label in zip(items, labels, strict=True)]
    if of_pairs is not None:
        items = [item._replace(weight=float(weight)) for item, weight in zip(items, of_pairs, strict=True)]

    # 3. The figures.
    spans, one_to_one, student_tokens, teacher_tokens, covered, size = counted.tolist()
    return items, _figures(totals) | {
        "spans/per_pair": spans / len(items),
        "spans/student_tokens": student_tokens / spans,
        "spans/teacher_tokens": teacher_tokens / spans,
        "spans/one_to_one": one_to_one / spans,
        "spans/bytes_covered": covered / size,
    }


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of small objects are made, which all stay: a fifth of the time goes into looking for garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _spans_of(pair: AlignedPair) -> np.ndarray:
    """Counts both responses' spans, those of one token with one, student and teacher tokens, bytes in spans, bytes."""
    found = np.zeros(6, np.int64)
    found[5] = pair.chosen_bytes + pair.rejected_bytes
    for aligned in (pair.chosen, pair.rejected):
        # Spans that face one token with one carry the teacher's signal most sharply.
        single = (np.bincount(aligned.student.span_ids) == 1) & (np.bincount(aligned.teacher.span_ids) == 1)
        tokens = [len(aligned.student.ids), len(aligned.teacher.ids)]
        found[:5] += np.array([aligned.num_spans, np.count_nonzero(single), *tokens, aligned.bounds[-1]])
    return found


def margin_values(
    worth: Sequence[tuple[str, float, float | None]], train: ConfigDict
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Returns by how much the chosen return of every pair has to lead; their labels and weights, None where all are 1.

    worth: id, weight and margin of each pair.
    """
    ids, given, told = zip(*worth, strict=True)
    lead, labels, weights = np.full(len(worth), train.offset / train.beta), None, np.array(given, np.float64)
    if train.margin_as != "none":
        margins = np.array([np.nan if margin is None else margin for margin in told], np.float32)
        if (missing := np.isnan(margins)).any():
            raise UserError(
                f"Pair {ids[int(np.argmax(missing))]} has no margin: config.train.margin_as {train.margin_as!r} "
                'needs a column "margin", or "score_chosen" and "score_rejected", in every row.'
            )
        if train.margin_as == "offset":
            lead = lead + train.trust * margins / train.beta
        elif train.margin_as == "label":
            labels = np.asarray(pair_labels(margins, train.trust))
        else:
            return lead, None, weights * np.asarray(sure_weights(margins, train.trust))
    return lead, labels, weights if (weights != 1).any() else None
