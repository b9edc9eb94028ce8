"""A model reads the data once and leaves the log-probability of every span.

Letters: R rows, K scored tokens of a row, S spans of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from ctpd_jax.core.projection import span_sums
from ctpd_jax.data.loader import micro_batches
from ctpd_jax.data.rows import PairItem, RowShape, ScoredResponse
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair, Array, Batch, Model
from ctpd_jax.train.step import Compute, Params, scored_logprobs


def plain_item(pair: AlignedPair, model: Model, prompt: np.ndarray | None = None) -> PairItem:
    """Returns one model's view of a pair, every token counting once. `prompt` replaces the pair's own."""

    def response(side: int) -> ScoredResponse:
        ids = pair.tokens(model, side).ids
        return ScoredResponse(ids, np.ones(len(ids), np.float32))

    return PairItem(pair.prompt(model) if prompt is None else prompt, response(CHOSEN), response(REJECTED))


def make_scorer(config: DecoderConfig, compute: Compute) -> Callable[[Params, Batch, Array], Array]:
    """Returns the jitted (params, batch, slot_spans int32 [R, K]) -> sums per row's span number, float32 [R, K]."""

    @jax.jit
    def score(params: Params, batch: Batch, slot_spans: Array) -> Array:
        return span_sums(scored_logprobs(config, params, batch, compute), slot_spans, slot_spans.shape[1])

    return score


def score_pairs(
    score: Callable[[Params, Batch, Array], Array],
    params: Params,
    items: Sequence[PairItem],
    spans: Sequence[tuple[np.ndarray, np.ndarray]],
    layout: str,
    shapes: Sequence[RowShape],
    micro_batch: int,
    done: Callable[[int], None] = lambda pairs: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns span log-probabilities of each pair, in order: (chosen, rejected), float32 [S] each.

    `spans[i]` are the span ids of pair i's chosen and rejected tokens, int32 [T]. `done` is told of finished pairs.
    """
    results: list[list[np.ndarray]] = [[] for _ in items]
    for batch, places in micro_batches(items, layout, shapes, micro_batch):
        slot_spans = np.full(batch.target.shape, -1, np.int32)
        used = np.zeros(len(slot_spans), np.int32)  # spans laid into each row so far
        found = []
        for number, place in enumerate(places):
            for side in (CHOSEN, REJECTED):
                rows, slots = np.nonzero((batch.pair == number) & (batch.side == side))
                row, count = rows[0], int(spans[place][side].max()) + 1
                slot_spans[row, slots] = used[row] + spans[place][side]
                found.append((place, row, used[row], used[row] + count))
                used[row] += count
        sums = np.asarray(score(params, batch, slot_spans))
        for place, row, first, last in found:
            results[place].append(sums[row, first:last])
        done(len(places))
    return [(chosen, rejected) for chosen, rejected in results]
