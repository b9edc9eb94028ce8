"""Scored responses -> rows of static shape. NumPy only.

Letters: P pairs, R rows, L row length, K scored tokens of a row.

Three layouts, exact to rounding for one another:
  response  one response a row, with its own copy of the prompt
  pair      chosen and rejected side by side in one row, each with its own copy of the prompt
  shared    one copy of the prompt, read by both responses
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, Batch, RowLayout

LAYOUTS = ("response", "pair", "shared")


@dataclass(frozen=True)
class ScoredResponse:
    """One response as a model reads it, and what its tokens count for."""

    tokens: np.ndarray  # int32 [T], at least one
    weights: np.ndarray  # float32 [T]
    constant: float = 0.0  # c(y), subtracted from the weighted log-probability
    start: float = float("nan")  # weighted log-probability under the model's own start


class PairItem(NamedTuple):
    """A prompt and the two responses to it; `rejected` is None for SFT."""

    prompt: np.ndarray  # int32 [Tp], at least one token: the first response token needs a predictor
    chosen: ScoredResponse
    rejected: ScoredResponse | None

    @property
    def responses(self) -> tuple[ScoredResponse, ...]:
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


@dataclass(frozen=True, order=True)
class RowShape:
    """The static shape of a row: one compiled program each."""

    length: int  # L
    scored: int  # K


def row_needs(item: PairItem, layout: str) -> list[RowShape]:
    """Returns the length and the scored tokens of each row that the item takes."""
    prompt, sizes = len(item.prompt), [len(r.tokens) for r in item.responses]
    if layout == "response":
        return [RowShape(prompt + n, n) for n in sizes]
    copies = 1 if layout == "shared" else len(sizes)
    return [RowShape(prompt * copies + sum(sizes), sum(sizes))]


def choose_shapes(items: Iterable[PairItem], layout: str, buckets: int, multiple: int) -> tuple[RowShape, ...]:
    """Chooses at most `buckets` row shapes from the data, so that every bucket holds about as many rows.

    Lengths are rounded up to `multiple`, and so are the scored tokens, which are as many as the rows of a bucket need.
    """
    if layout not in LAYOUTS:
        raise UserError(f"rows.layout is {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    needs = np.array([(n.length, n.scored) for item in items for n in row_needs(item, layout)], np.int64)
    if not len(needs):
        raise UserError("There is no pair left to train or score on.")
    lengths = np.sort(needs[:, 0])
    quantiles = lengths[
        [len(lengths) * (i + 1) // buckets - 1 for i in range(buckets) if len(lengths) * (i + 1) >= buckets]
    ]
    shapes = []
    for bound in np.unique(-(-quantiles // multiple) * multiple):
        scored = needs[needs[:, 0] <= bound, 1].max()
        shapes.append(RowShape(int(bound), int(min(bound, -(-scored // multiple) * multiple))))
    return tuple(shapes)


def smallest_shape(items: Sequence[PairItem], layout: str, shapes: Sequence[RowShape]) -> RowShape:
    """Returns the first shape that takes every row of the items."""
    needs = [n for item in items for n in row_needs(item, layout)]
    length, scored = max(n.length for n in needs), max(n.scored for n in needs)
    for shape in shapes:
        if shape.length >= length and shape.scored >= scored:
            return shape
    raise UserError(f"A row of {length} tokens, {scored} of them scored, fits none of the shapes {list(shapes)}.")


def build_batch(items: Sequence[PairItem], layout: str, shape: RowShape, pairs: int) -> Batch:
    """Lays `items` out in rows of `shape`; a batch has room for `pairs` pairs, and missing ones are padding."""
    if len(items) > pairs:
        raise ValueError(f"{len(items)} items do not fit a batch of {pairs} pairs.")
    per_pair = max(len(row_needs(items[0], layout)), 1)
    rows = pairs * per_pair
    row_ints = {name: np.zeros((rows, shape.length), np.int32) for name in ("tokens", "positions", "segment", "parent")}
    slot_ints = {name: np.zeros((rows, shape.scored), np.int32) for name in ("predictor", "target", "pair", "side")}
    slot_ints["pair"][:] = -1
    weight = np.zeros((rows, shape.scored), np.float32)
    constant, start = np.zeros((pairs, 2), np.float32), np.zeros((pairs, 2), np.float32)
    real = (np.arange(pairs) < len(items)).astype(np.float32)

    for number, item in enumerate(items):
        row, used, slots, segment, prompt = number * per_pair, 0, 0, 0, len(item.prompt)

        def write(first: int, tokens: np.ndarray, position: int, own: int, parent: int, row: int) -> None:
            place = (row, slice(first, first + len(tokens)))
            row_ints["tokens"][place] = tokens
            row_ints["positions"][place] = np.arange(position, position + len(tokens))
            row_ints["segment"][place], row_ints["parent"][place] = own, parent

        if layout == "shared":
            write(0, item.prompt, 0, 1, 1, row)
            used, segment = prompt, 1
        for side, response in zip((CHOSEN, REJECTED), item.responses):
            if layout == "response":
                row, used, slots, segment = number * per_pair + side, 0, 0, 0
            segment += 1
            if layout == "shared":
                parent, last = 1, prompt - 1  # every response is predicted from the one prompt
            else:
                write(used, item.prompt, 0, segment, segment, row)
                used, parent = used + prompt, segment
                last = used - 1
            count = len(response.tokens)
            write(used, response.tokens, prompt, segment, parent, row)
            place = (row, slice(slots, slots + count))
            slot_ints["predictor"][place] = np.concatenate([[last], np.arange(used, used + count - 1)])
            slot_ints["target"][place] = response.tokens
            slot_ints["pair"][place], slot_ints["side"][place] = number, side
            weight[place] = response.weights
            constant[number, side], start[number, side] = response.constant, response.start
            used, slots = used + count, slots + count

    return Batch(
        tokens=row_ints["tokens"],
        layout=RowLayout(row_ints["positions"], row_ints["segment"], row_ints["parent"]),
        weight=weight,
        constant=constant,
        start=start,
        real=real,
        **slot_ints,
    )
