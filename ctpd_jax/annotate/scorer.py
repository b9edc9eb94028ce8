"""A model reads the data once and leaves the log-probability of every span.

Letters: C models, R rows, K scored tokens of a row, S spans of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from ctpd_jax.core.projection import span_sums
from ctpd_jax.data.loader import micro_batches
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import BatchShape, PairItem, ScoredResponse, pair_weights
from ctpd_jax.models.compute import Compute, scored_logprobs
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params
from ctpd_jax.models.lora import join
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair, Array, Batch, Model
from ctpd_jax.sharding import compiler_options


def plain_item(pair: AlignedPair, model: Model, prompt: np.ndarray | None = None) -> PairItem:
    """Returns one model's view of a pair, every token counting once. `prompt` replaces the pair's own."""
    own = pair.prompt(model) if prompt is None else prompt
    return PairItem(own, _plain_response(pair, model, CHOSEN), _plain_response(pair, model, REJECTED), id=pair.id)


def response_items(pairs: Sequence[AlignedPair], model: Model, side: int) -> list[PairItem]:
    """Returns the responses of one side alone, every token counting once."""
    return [PairItem(pair.prompt(model), _plain_response(pair, model, side), None, id=pair.id) for pair in pairs]


def _plain_response(pair: AlignedPair, model: Model, side: int) -> ScoredResponse:
    ids = pair.tokens(model, side).ids
    return ScoredResponse(ids, np.ones(len(ids), np.float32))


def dpo_items(
    pairs: Sequence[AlignedPair],
    model: Model,
    reference: Sequence[tuple[np.ndarray, np.ndarray]],
    swapped: bool = False,
) -> list[PairItem]:
    """Returns pairs for plain DPO: weights of one, c the reference's log-probability of the whole response.

    `reference` holds its span log-probabilities, float32 [S] of each response; with `swapped` the sides are.
    """
    items = []
    for pair, scores, weight in zip(pairs, reference, pair_weights(pairs), strict=True):
        responses = []
        for side in (CHOSEN, REJECTED):
            ids = pair.tokens(model, side).ids
            total = float(scores[side].sum(dtype=np.float64))
            responses.append(ScoredResponse(ids, np.ones(len(ids), np.float32), total, total, total))
        chosen, rejected = reversed(responses) if swapped else responses
        items.append(PairItem(pair.prompt(model), chosen, rejected, weight=weight, id=pair.id))
    return items


Scorer = Callable[[Batch, Array], Array]  # batch, slot_spans int32 [R, K] -> sums per row's span number [C, R, K]


def make_scorer(config: DecoderConfig, compute: Compute) -> jax.stages.Wrapped:
    """Returns the jitted (adapters, base, batch, slot_spans int32 [R, K]) -> sums per row's span number, [C, R, K].

    C models read in one pass: one model, with `adapters` {}, or C adapters, stacked [C, ...], over one base; then
    `config` has its `lora`.
    """

    def one(adapters: Params, base: Params, batch: Batch, slot_spans: Array) -> Array:
        # A row has at most as many spans as it has scored slots, whatever responses lie in it.
        logps = scored_logprobs(config, join(base, adapters), batch, compute)
        return span_sums(logps, slot_spans, slot_spans.shape[1])

    @partial(jax.jit, compiler_options=compiler_options(compute.mesh))
    def score(adapters: Params, base: Params, batch: Batch, slot_spans: Array) -> Array:
        if not adapters:
            return one({}, base, batch, slot_spans)[None]
        return jax.vmap(one, in_axes=(0, None, None, None))(adapters, base, batch, slot_spans)

    return score


def score_pairs(
    score: Scorer,
    items: Sequence[PairItem],
    spans: Sequence[tuple[np.ndarray, np.ndarray]],
    micro_batch: int,
    rows: PackingConfig,
    shapes: Sequence[BatchShape],
    done: Callable[[int], object] = lambda pairs: None,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Returns, for each of the C models, each pair's span log-probabilities: (chosen, rejected), float32 [S] each.

    `spans[i]` are the span ids of pair i's chosen and rejected tokens, int32 [T]. `done` is told of finished pairs.
    """
    results: list[list[np.ndarray]] = [[] for _ in items]  # [C, S] of chosen and of rejected
    for batch, places in micro_batches(items, micro_batch, rows, shapes):
        # 1. Spans are numbered along each row, over all the responses that lie in it.
        slot_spans = np.full(batch.target.shape, -1, np.int32)
        used = np.zeros(len(slot_spans), np.int32)  # spans laid into each row so far
        found = []
        for number, place in enumerate(places):
            for side in (CHOSEN, REJECTED):
                in_rows, slots = np.nonzero((batch.pair == number) & (batch.side == side))
                row, count = in_rows[0], int(spans[place][side].max()) + 1
                slot_spans[row, slots] = used[row] + spans[place][side]
                found.append((place, row, used[row], used[row] + count))
                used[row] += count
        # 2. One sum for each number, and then each response takes its own.
        sums = np.asarray(score(batch, slot_spans))
        for place, row, first, last in found:
            results[place].append(sums[:, row, first:last])
        done(len(places))
    # 3. By model, as a column holds it.
    columns = len(results[0][0]) if results else 0
    return [[(chosen[c], rejected[c]) for chosen, rejected in results] for c in range(columns)]
