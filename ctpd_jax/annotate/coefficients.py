"""What was measured -> what the training step needs: one weight per student token, one constant per response.

This happens when the store is read, so another mu, clip, transform or reference needs no new annotation.

Letters: N responses; S spans of a response and T student tokens, padded to a few sizes, so that few programs are
compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from ctpd_jax.data.rows import PairItem, ScoredResponse, pair_weights
from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES, Aligned, AlignedPair, Array

Scores = Mapping[str, np.ndarray]  # scorer -> float32 [S]
Example = tuple[AlignedPair, Mapping[str, Scores]]  # a pair, and per side the scores of its response

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


def padded(rows: Sequence[np.ndarray], size: int, dtype: type = np.float32, fill: int = 0) -> np.ndarray:
    """Stacks ragged rows: [N, size], `fill` behind each."""
    out: np.ndarray = np.full((len(rows), size), fill, dtype)
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
    examples: Sequence[Example], weights: ConfigDict, train: ConfigDict, seed: int, first: int = 0
) -> tuple[list[tuple[SpanValues, SpanValues]], dict[str, float]]:
    """Returns the values of every pair's chosen and rejected spans, and the diagnostics of the weights.

    `first` is the place of the first example in the data: random weights are drawn by place.

    `train.normalize = "start"` (margin relative to the student's start) is the student's start as reference: the other
    reference cancels from that margin.
    """
    # Where the teacher is followed span by span, it is not the reference besides.
    followed = train.objective in ("regression", "mixed")
    reference = "start" if followed or train.normalize == "start" else REFERENCES[train.reference]
    normalize: Normalize = "none" if train.normalize == "start" else train.normalize

    contrastive = weights.source not in ("uniform", "random")
    before = "reference" if weights.positive_scorer == "teacher" else "start"  # what pi+ was trained from
    opposite = before if weights.source == "dpo_reference" else "negative"
    other = before if train.contrast == "start" else opposite

    @jax.jit
    def measure(scores: Scores, student: Array, teacher: Array, sizes: Array, side: Array, keys: Array) -> tuple:
        # `student` and `teacher` count the tokens of each span, `sizes` its bytes.
        mask, mu = student > 0, jnp.where(side == CHOSEN, weights.mu, -weights.mu)
        zeros = jnp.zeros(mask.shape)
        positive, negative = (scores["positive"], scores[opposite]) if contrastive else (zeros, zeros)
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
    responses = [(pair.response(s), scores[name], s) for pair, scores in examples for s, name in enumerate(SIDES)]
    out: list[SpanValues | None] = [None] * len(responses)
    totals: dict[str, np.ndarray] = {}
    # All responses of one padded size go through the program together: one compilation for each size.
    for size, places in by_size([aligned.num_spans for aligned, _, _ in responses]).items():
        part = [responses[i] for i in places]
        names = part[0][1].keys()
        found, diagnostics = measure(
            {name: padded([scores[name] for _, scores, _ in part], size) for name in names},
            padded([np.bincount(aligned.student.span_ids) for aligned, _, _ in part], size, np.int32),
            padded([np.bincount(aligned.teacher.span_ids) for aligned, _, _ in part], size, np.int32),
            padded([np.diff(aligned.bounds) for aligned, _, _ in part], size, np.int32),
            np.array([side for _, _, side in part], np.int32),
            jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.array(places, jnp.uint32) + 2 * first),
        )
        # The projection is a program of its own: in `measure` it would change how XLA fuses, and so rounds, c.
        w, a, targets, *sums = found
        longest = padded_size(max(len(aligned.student.ids) for aligned, _, _ in part))
        span_ids = padded([aligned.student.span_ids for aligned, _, _ in part], longest, np.int32, fill=-1)
        w, of_tokens, targets, *sums = jax.device_get((w, project(a, span_ids), targets, *sums))
        for row, place in enumerate(places):
            aligned = responses[place][0]
            token_weights = of_tokens[row, : len(aligned.student.ids)]
            own = None if targets is None else targets[row, : aligned.num_spans]
            constant, start, plain = (float(each[row]) for each in sums)
            out[place] = SpanValues(w[row, : aligned.num_spans], token_weights, constant, start, plain, own)
        for name, (total, count) in jax.device_get(diagnostics).items():
            totals[name] = totals.get(name, 0) + np.array([total, count], np.float64)
    figures = {f"weights/{name}": float(total / max(count, 1)) for name, (total, count) in totals.items()}
    whole = [value for value in out if value is not None]
    return list(zip(whole[::2], whole[1::2], strict=True)), figures


def training_items(
    examples: Sequence[Example], weights: ConfigDict, train: ConfigDict, seed: int
) -> tuple[list[PairItem], dict[str, float]]:
    """Returns the student's items for CTPD, and figures about spans and weights that every log line repeats."""
    # All at once on the device, then pair by pair on the host.
    values, figures = span_values(examples, weights, train, seed)
    pairs = [pair for pair, _ in examples]
    leads, of_pairs = margin_values(pairs, train)

    def response(aligned: Aligned, value: SpanValues, lead: float = 0.0) -> ScoredResponse:
        spans = (None, None) if value.targets is None else (aligned.student.span_ids, value.targets)
        ids, weights = aligned.student.ids, value.token_weights
        return ScoredResponse(ids, weights, value.constant + lead, value.start, value.reference, *spans)

    items = []
    for number, (pair, both, given) in enumerate(zip(pairs, values, pair_weights(pairs))):
        # What the chosen response has to lead by lowers its return.
        chosen = response(pair.chosen, both[CHOSEN], float(leads[number]))
        rejected = response(pair.rejected, both[REJECTED])
        label, weight = (float(of_pairs[name][number]) if name in of_pairs else None for name in ("label", "weight"))
        if given is not None:
            weight = given * (1 if weight is None else weight)
        items.append(PairItem(pair.student_prompt, chosen, rejected, label, weight))
    return items, figures | span_figures(pairs)


def margin_values(pairs: Sequence[AlignedPair], train: ConfigDict) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns by how much the chosen return of every pair has to lead, and `label` or `weight` where pairs have one."""
    lead, of_pairs = np.full(len(pairs), train.offset / train.beta), {}
    if train.margin_as != "none":
        margins = np.array([np.nan if pair.margin is None else pair.margin for pair in pairs], np.float32)
        if (missing := np.isnan(margins)).any():
            raise UserError(
                f"Pair {pairs[int(np.argmax(missing))].id} has no margin: config.train.margin_as {train.margin_as!r} "
                'needs a column "margin", or "score_chosen" and "score_rejected", in every row.'
            )
        if train.margin_as == "offset":
            lead = lead + train.trust * margins / train.beta
        else:
            made = pair_labels if train.margin_as == "label" else sure_weights
            of_pairs[train.margin_as] = np.asarray(made(margins, train.trust))
    return lead, of_pairs


def span_figures(pairs: Sequence[AlignedPair]) -> dict[str, float]:
    """Spans per pair, tokens per span, share of one-to-one spans, and share of the text's bytes that is covered."""
    responses = [pair.response(side) for pair in pairs for side in (CHOSEN, REJECTED)]
    # Spans that face one token with one carry the teacher's signal most sharply.
    spans = sum(r.num_spans for r in responses)
    one_to_one = sum(
        int(((np.bincount(r.student.span_ids) == 1) & (np.bincount(r.teacher.span_ids) == 1)).sum()) for r in responses
    )
    return {
        "spans/per_pair": spans / len(pairs),
        "spans/student_tokens": sum(len(r.student.ids) for r in responses) / spans,
        "spans/teacher_tokens": sum(len(r.teacher.ids) for r in responses) / spans,
        "spans/one_to_one": one_to_one / spans,
        "spans/bytes_covered": sum(int(r.bounds[-1]) for r in responses)
        / sum(pair.chosen_bytes + pair.rejected_bytes for pair in pairs),
    }
