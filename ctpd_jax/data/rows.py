"""Scored responses -> rows of static shape. NumPy only.

Letters: P pairs, R rows, L row length, K scored tokens of a row.

Two layouts, exact to rounding for one another. Each says what a unit is, the piece that lies in one row:
  response  one response with its own copy of the prompt
  shared    a pair: one copy of the prompt, read by both responses
A row holds one unit, or several that do not see one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair, Batch, RowLayout, SpanSlots

LAYOUTS = ("response", "shared")


@dataclass(frozen=True)
class ScoredResponse:
    """One response as a model reads it, and what its tokens count for."""

    tokens: np.ndarray  # int32 [T], at least one
    weights: np.ndarray  # float32 [T]
    constant: float = 0.0  # c(y), subtracted from the weighted log-probability
    start: float = float("nan")  # log-probability under the model's own start, every token counting one
    reference: float = 0.0  # the same of the reference
    span_ids: np.ndarray | None = None  # int32 [T], 0..S-1; where spans have targets
    targets: np.ndarray | None = None  # float32 [S], log-probabilities


class PairItem(NamedTuple):
    """A prompt and the two responses to it; `rejected` is None for SFT."""

    prompt: np.ndarray  # int32 [Tp], at least one token: the first response token needs a predictor
    chosen: ScoredResponse
    rejected: ScoredResponse | None
    label: float | None = None  # probability that the chosen response is the better one, where that is not certain
    weight: float | None = None  # how much the pair counts, where that differs
    id: str = ""  # of the pair, to name it

    @property
    def responses(self) -> tuple[ScoredResponse, ...]:
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


@dataclass(frozen=True, order=True)
class BatchShape:
    """The static shape of a batch: one compiled program each."""

    rows: int  # R
    length: int  # L
    scored: int  # K


def unit_needs(item: PairItem, layout: str) -> list[tuple[int, int]]:
    """Return the tokens and the scored tokens of each unit of the item."""
    if layout not in LAYOUTS:
        raise UserError(f"rows.layout is {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    prompt, sizes = len(item.prompt), [len(r.tokens) for r in item.responses]
    if layout == "response":
        return [(prompt + n, n) for n in sizes]
    return [(prompt + sum(sizes), sum(sizes))]


def build_batch(
    items: Sequence[PairItem],
    layout: str,
    shape: BatchShape,
    pairs: int,
    places: Sequence[int] | np.ndarray | None = None,
) -> Batch:
    """Lay `items` out in a batch of `shape`.

    pairs: the batch has room for so many, and missing ones are padding.
    places: the row of each unit, in the order of the items; None: each has a row of its own.
    """
    if len(items) > pairs:
        raise ValueError(f"{len(items)} items do not fit a batch of {pairs} pairs.")
    # 1. An empty batch.
    of_row, of_slot = (shape.rows, shape.length), (shape.rows, shape.scored)
    extra = extra_fields(items[0])
    batch = Batch(
        tokens=np.zeros(of_row, np.int32),
        layout=RowLayout(*(np.zeros(of_row, np.int32) for _ in RowLayout._fields)),
        predictor=np.zeros(of_slot, np.int32),
        target=np.zeros(of_slot, np.int32),
        pair=np.full(of_slot, -1, np.int32),
        side=np.zeros(of_slot, np.int32),
        weight=np.zeros(of_slot, np.float32),
        constant=np.zeros((pairs, 2), np.float32),
        start=np.zeros((pairs, 2), np.float32),
        reference=np.zeros((pairs, 2), np.float32),
        real=(np.arange(pairs) < len(items)).astype(np.float32),
        label=np.ones(pairs, np.float32) if "label" in extra else None,
        pair_weight=np.zeros(pairs, np.float32) if "pair_weight" in extra else None,
        spans=SpanSlots(np.full(of_slot, -1, np.int32), *np.zeros((2, *of_slot), np.float32))
        if "spans" in extra
        else None,
    )
    first_span = np.zeros(shape.rows, np.int32)  # spans of each row so far
    used, slots, segments = (np.zeros(shape.rows, np.int64) for _ in range(3))  # of each row so far

    def write(row: int, tokens: np.ndarray, position: int, parent: int) -> None:
        """Append a segment, or the rest of one, to a row; `parent` 0 is the segment itself."""
        place = (row, slice(used[row], used[row] + len(tokens)))
        batch.tokens[place] = tokens
        batch.layout.positions[place] = np.arange(position, position + len(tokens))
        batch.layout.segment[place] = segments[row]
        batch.layout.parent[place] = parent or segments[row]
        used[row] += len(tokens)

    # 2. Item by item: a prompt where the layout has one, a response, and the slots of its tokens.
    numbers = iter(range(shape.rows) if places is None else places)
    for number, item in enumerate(items):
        row = last = parent = 0
        for side, response in zip((CHOSEN, REJECTED), item.responses):
            if side == CHOSEN or layout == "response":
                row = next(numbers)
                segments[row] += 1
                write(row, item.prompt, 0, 0)
                last = used[row] - 1  # it predicts the first token of the response
            if layout == "shared":
                parent = parent or segments[row]
                segments[row] += 1
            count, first = len(response.tokens), used[row]
            write(row, response.tokens, len(item.prompt), parent)
            # Every token but the first is predicted by the one before it.
            place = (row, slice(slots[row], slots[row] + count))
            batch.predictor[place] = np.concatenate([[last], np.arange(first, first + count - 1)])
            batch.target[place] = response.tokens
            batch.pair[place], batch.side[place] = number, side
            batch.weight[place] = response.weights
            if batch.spans is not None:
                first_span[row] = _write_spans(batch.spans, place, first_span[row], response)
            slots[row] += count
            batch.constant[number, side] = response.constant
            batch.start[number, side], batch.reference[number, side] = response.start, response.reference
        if batch.label is not None:
            batch.label[number] = item.label
        if batch.pair_weight is not None:
            batch.pair_weight[number] = item.weight
    return batch


def pair_weights(pairs: Sequence[AlignedPair]) -> list[float | None]:
    """Return the weights that the data give their pairs; None for each where all are 1, as nearly always."""
    some = any(pair.weight != 1 for pair in pairs)
    return [pair.weight if some else None for pair in pairs]


def extra_fields(item: PairItem) -> tuple[str, ...]:
    """Return which optional fields a batch of such items has; all items of a stage are alike."""
    found = {"label": item.label, "pair_weight": item.weight, "spans": item.chosen.targets}
    return tuple(name for name, value in found.items() if value is not None)


def _write_spans(spans: SpanSlots, place: tuple[int, slice], first: int, response: ScoredResponse) -> int:
    """Write a response's spans, numbered from `first` on; return the next number."""
    ids, targets = response.span_ids, response.targets
    assert ids is not None and targets is not None
    spans.span[place] = first + ids
    spans.target[place] = targets[ids]
    # Span ids do not decrease: a span's first token is where they change.
    spans.share[place] = np.diff(ids, prepend=-1).astype(bool) / len(targets)
    return first + len(targets)
