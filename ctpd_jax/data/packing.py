"""Which rows a batch's responses lie in, and the few static shapes that all batches of a stage take. NumPy only.

A unit is what lies in a row as one piece: a response with its prompt, or both responses of a pair; see data.rows.
`pack` and `place` put units into rows, `fit` chooses among given shapes, `choose_shapes` finds the shapes.

Letters: B micro-batches, U units of a micro-batch, R rows, L row length, K scored tokens of a row, S shapes, C kinds of
rows, (L, K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ctpd_jax.data.rows import BatchShape, PairItem, unit_needs
from ctpd_jax.errors import UserError

# Kinds of rows are compared on so many units from the beginning of a stage; the rows are then counted on all of them.
SAMPLE = 8192
MUCH_PADDING = 0.3  # of all tokens: a warning
LENGTHS = 32  # row lengths to compare, at most
LONGEST = 2048  # of a packed row, or three times the longest unit
SLACK = (1.0, 1.05, 1.1, 1.25)  # scored tokens of a packed row, relative to their share in all tokens


@dataclass(frozen=True)
class PackingConfig:
    """How responses are laid out in rows, and how many programs may be compiled for that."""

    layout: str = "response"  # see data.rows
    packed: bool = False  # as many units in a row as it takes; else each has a row of its own
    buckets: int = 4  # shapes, at most
    multiple: int = 64  # L and K are multiples of it
    length: int = 0  # L; 0: chosen from the data
    row_multiple: int = 1  # R is a multiple of it: the devices that the rows are divided among
    fewer: bool = False  # an update may take more passes, of fewer pairs, where that lays out less
    program: float = 0.0  # tokens that take as long as compiling for one more shape: it has to save so many


class Units(NamedTuple):
    """The units of micro-batches, in each the longest first."""

    tokens: np.ndarray  # int64 [B, U]; 0 where a micro-batch has fewer
    scored: np.ndarray  # int64 [B, U]
    order: np.ndarray  # int64 [B, U]: the unit's number before they were sorted

    def part(self, which: np.ndarray) -> Units:
        return Units(self.tokens[which], self.scored[which], self.order[which])


def needs_of(items: Sequence[PairItem], layout: str) -> np.ndarray:
    """Return the tokens and scored tokens of every item's units: int64 [items, units of an item, 2]."""
    if not len(items):
        raise UserError("There is no pair left to train or score on.")
    return np.array([unit_needs(item, layout) for item in items], np.int64)


def units_of(needs: np.ndarray, groups: Sequence[Sequence[int] | np.ndarray]) -> Units:
    """Return the units of micro-batches, given the places of each one's items in `needs`."""
    # A micro-batch with fewer items is filled up with one that needs nothing.
    places = np.full((len(groups), max(map(len, groups))), len(needs))
    for row, group in zip(places, groups):
        row[: len(group)] = group
    needs = np.concatenate([needs, np.zeros_like(needs[:1])])[places]  # [B, items, units of an item, 2]
    tokens, scored = needs.reshape(len(groups), -1, 2).transpose(2, 0, 1)
    order = np.argsort(-tokens, axis=1, kind="stable")
    return Units(np.take_along_axis(tokens, order, 1), np.take_along_axis(scored, order, 1), order)


def split(needs: np.ndarray, micro_batch: int, packed: bool) -> list[np.ndarray]:
    """Cut items into groups of at most `micro_batch`; return the places of each."""
    if not packed:
        # Items of about the same length come together, the shortest first.
        order = np.argsort(needs[:, :, 0].max(axis=1), kind="stable")
        return [order[first : first + micro_batch] for first in range(0, len(order), micro_batch)]
    # Groups of about equal size need few shapes: items are dealt out like cards, every second lap backwards.
    order = np.argsort(-needs[:, :, 0].sum(axis=1), kind="stable")
    count = -(-len(order) // micro_batch)
    lap, place = np.divmod(np.arange(len(order)), count)
    owner = np.where(lap % 2 == 0, place, count - 1 - place)
    return [order[owner == group] for group in range(count)]


def pack(units: Units, length: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Put units into rows by best fit, the longest first: each into the fullest row that takes it, or a new one.

    length, scored: int [B], what a row of each micro-batch takes; no unit may need more.
    Returns the row of each unit, int64 [B, U], -1 where there is none; it does not depend on the other micro-batches.
    """
    count = len(units.tokens)
    empty = np.stack([length, scored])[:, :, None]  # [2, B, 1]
    free, every = empty.copy(), np.arange(count)
    places = np.full(units.tokens.shape, -1)
    for number, (tokens, slots) in enumerate(zip(units.tokens.T, units.scored.T)):
        fits = (free[0] >= tokens[:, None]) & (free[1] >= slots[:, None])
        if not fits.any(axis=1).all():
            free = np.concatenate([free, empty], axis=2)
            fits = np.concatenate([fits, np.ones((count, 1), bool)], axis=1)
        # The fullest row that takes it has the least room.
        row = np.where(fits, free[0], np.iinfo(np.int64).max).argmin(axis=1)
        free[:, every, row] -= np.stack([tokens, slots])
        places[:, number] = np.where(tokens > 0, row, -1)
    return places


def place(units: Units, kinds: np.ndarray, packing: PackingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Lay every micro-batch out in rows of every kind, int [C, 2].

    Returns the row of each unit, int64 [C, B, U], -1 where there is none; and how many rows that makes,
    float64 [C, B], infinity where a unit is too long for that kind of row.
    """
    # Every pair of a kind and a micro-batch is one more micro-batch.
    size, count = units.tokens.shape, len(kinds)
    units = Units(*(np.tile(array, (count, 1)) for array in units))
    length, scored = np.repeat(np.asarray(kinds, np.int64), size[0], axis=0).T
    possible = (units.tokens.max(axis=1) <= length) & (units.scored.max(axis=1) <= scored)
    if packing.packed:
        places = np.full(units.tokens.shape, -1)
        places[possible] = pack(units.part(possible), length[possible], scored[possible])
        needed = places.max(axis=1) + 1
    else:
        places = np.where(units.tokens > 0, units.order, -1)
        needed = np.full(len(places), size[1])  # also for the last micro-batch, which may have fewer units
    needed = np.where(possible, round_up(needed, packing.row_multiple), np.inf)
    return places.reshape(count, *size), needed.reshape(count, size[0])


def fit(units: Units, shapes: Sequence[BatchShape], packing: PackingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the first of the shapes that takes each micro-batch, int64 [B]; and the row of each unit, int64 [B, U].

    The units are numbered as before they were sorted. Raises UserError where no shape takes a micro-batch.
    """
    places, needed = place(units, np.array([(shape.length, shape.scored) for shape in shapes]), packing)
    fits = needed <= np.array([shape.rows for shape in shapes])[:, None]
    taken = np.any(fits, axis=0)
    if not taken.all():
        worst = units.part(np.logical_not(taken))
        raise UserError(
            f"A micro-batch of {int(worst.tokens[0].sum()):,} tokens, {int(worst.scored[0].sum()):,} of them scored "
            f"and up to {int(worst.tokens[0, 0]):,} in a row, fits none of the shapes {list(shapes)}."
        )
    choice = fits.argmax(axis=0)
    sorted_places = places[choice, np.arange(len(choice))]
    # Back to the order in which the units came.
    own = np.empty_like(sorted_places)
    np.put_along_axis(own, units.order, sorted_places, axis=1)
    return choice, own


def choose_shapes(units: Units, packing: PackingConfig) -> tuple[BatchShape, ...]:
    """Choose at most `packing.buckets` shapes that take all micro-batches at the least cost, the cheapest first.

    Each but the first saves more than `packing.program`. Raises UserError where a unit is longer than `packing.length`.
    """
    # 1. Kinds of rows are compared on the beginning of the stage, and on the longest unit.
    kinds = _kinds(units, packing)
    longest = np.argmax(units.tokens[:, 0])
    some = np.unique(np.append(np.arange(min(len(units.tokens), -(-SAMPLE // units.tokens.shape[1]))), longest))
    price = packing.program * len(some) / len(units.tokens)
    few = _cheapest(place(units.part(some), kinds, packing)[1], kinds, packing.buckets, price)
    # 2. How many rows of those kinds are needed is counted on all of it.
    kinds = np.unique([(shape.length, shape.scored) for shape in few], axis=0)
    return tuple(_cheapest(place(units, kinds, packing)[1], kinds, packing.buckets, packing.program))


def _kinds(units: Units, packing: PackingConfig) -> np.ndarray:
    """Return row lengths and scored tokens that are worth a comparison: int64 [C, 2]."""
    # 1. Lengths: the one of the config, or some that suit the units.
    tokens, scored = units.tokens[:, 0], units.scored.max(axis=1)  # [B]
    least = int(round_up(tokens.max(), packing.multiple))
    if packing.length:
        if tokens.max() > packing.length:
            raise UserError(
                f"config.rows.length is {packing.length}, but a row has to take {tokens.max()} tokens at once: raise "
                "it, set it to 0, or lower config.data.max_prompt_tokens or config.data.max_response_tokens."
            )
        lengths = np.array([packing.length])
    else:
        if packing.packed:
            # A row much longer than a device's share of all the tokens would stay empty in part.
            most = min(max(LONGEST, 3 * least), 2 * units.tokens.sum(axis=1).max() // packing.row_multiple)
            lengths = np.linspace(least, max(least, most), LENGTHS)
        else:
            lengths = np.quantile(tokens, np.linspace(0, 1, LENGTHS))
        lengths = np.unique(round_up(lengths, packing.multiple))
    # 2. Scored tokens: of packed rows about their share in all tokens, of others what their units need.
    if packing.packed:
        share = int(units.scored.sum()) / int(units.tokens.sum())
        slots = np.maximum(lengths[:, None] * share * np.array(SLACK), scored.max())
    else:
        slots = np.array([[scored[tokens <= length].max()] for length in lengths])
    slots = np.minimum(round_up(slots, packing.multiple), lengths[:, None])
    return np.unique([(length, slot) for length, own in zip(lengths, slots) for slot in own], axis=0)


def cost(shape: BatchShape) -> float:
    """Estimate how long a batch of that shape takes, in tokens.

    A scored token costs a quarter more for the unembedding, and attention to a row doubles the cost at 16,384 tokens:
    the proportions of a model of about a billion parameters.
    """
    return shape.rows * (shape.length + shape.scored / 4 + shape.length**2 / 16384)


def _cheapest(needed: np.ndarray, kinds: np.ndarray, count: int, price: float) -> list[BatchShape]:
    """Return at most `count` shapes that take all micro-batches, by the rows that each needs of each kind, [C, B].

    price: what a shape has to save.
    """
    # 1. The candidates, and what each micro-batch costs in each of them.
    found: list[tuple[float, BatchShape, np.ndarray]] = []
    for (length, scored), own in zip(kinds.tolist(), needed):
        for number in np.unique(own[np.isfinite(own)]):
            shape = BatchShape(int(number), length, scored)
            found.append((cost(shape), shape, np.where(own <= number, cost(shape), np.inf)))
    found.sort(key=lambda each: each[:2])
    costs = np.array([own for _, _, own in found])  # [S, B]

    def totals(chosen: list[int]) -> np.ndarray:
        """Return the cost of all micro-batches with each of the shapes added to the chosen ones: [S]."""
        return np.minimum(costs, costs[chosen].min(axis=0, initial=np.inf)).sum(axis=1)

    # 2. The cheapest one that takes all; then what saves most, and enough.
    chosen = [int(np.argmin(totals([])))]
    best = costs[chosen].min(axis=0).sum()
    while len(chosen) < count and best - (sums := totals(chosen)).min() > price:
        chosen.append(int(np.argmin(sums)))
        best = sums.min()
    # 3. One is exchanged for another as long as that saves.
    improved = True
    while improved:
        improved = False
        for other in range(len(chosen)):
            rest = chosen[:other] + chosen[other + 1 :]
            sums = totals(rest)
            if sums.min() < best * (1 - 1e-9):
                chosen, best, improved = [*rest, int(np.argmin(sums))], sums.min(), True
    used = np.unique(np.array(sorted(chosen))[costs[sorted(chosen)].argmin(axis=0)])
    return [found[i][1] for i in used]


def in_words(padding: float) -> str:
    """Say what share of the tokens is padding, and what lowers it where it is large."""
    advice = f"; more than {MUCH_PADDING:.0%} is time lost. Try rows.layout=response or shared with rows.length=0, "
    advice += "rows.packed=yes, or a micro_batch that is larger (of packed rows) or smaller (of others)"
    return f"{padding:.0%} of the tokens in rows are padding{advice if padding > MUCH_PADDING else ''}."


def round_up(values: np.ndarray | float, multiple: int) -> np.ndarray:
    return (-(-np.asarray(values) // multiple) * multiple).astype(np.int64)
