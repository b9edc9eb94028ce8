"""Batches addressed by step: which examples an update sees is a function of (seed, step) and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ctpd_jax.data.rows import PairItem, RowShape, build_batch, row_needs, smallest_shape
from ctpd_jax.errors import UserError
from ctpd_jax.schema import Batch


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Returns the whole batches of an epoch; what is left over waits for the next epoch's order."""
    if examples < batch_size:
        raise UserError(f"{examples} examples do not fill one batch of {batch_size}: lower batch_size or add data.")
    return examples // batch_size


def batch_indices(seed: int, step: int, examples: int, batch_size: int) -> np.ndarray:
    """Returns the examples of update `step` (counted from 0): int64 [batch_size].

    index = permutation(seed, epoch)[(step mod steps_per_epoch) * batch_size + i], so a resumed run, on any number of
    hosts, sees what the undisturbed one would have seen.
    """
    epoch, place = divmod(step, steps_per_epoch(examples, batch_size))
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples)
    return order[place * batch_size : (place + 1) * batch_size]


def micro_batches(
    items: Sequence[PairItem], layout: str, shapes: Sequence[RowShape], micro_batch: int
) -> Iterator[tuple[Batch, list[int]]]:
    """Cuts items into batches of `micro_batch` pairs, shortest first, each in the smallest shape that takes it.

    Yields the batch and the places of its pairs in `items`.
    """
    order = sorted(range(len(items)), key=lambda i: max(n.length for n in row_needs(items[i], layout)))
    for first in range(0, len(order), micro_batch):
        places = order[first : first + micro_batch]
        chosen = [items[i] for i in places]
        yield build_batch(chosen, layout, smallest_shape(chosen, layout, shapes), micro_batch), places


def update_batches(
    item: Callable[[int], PairItem],
    examples: int,
    seed: int,
    batch_size: int,
    layout: str,
    shapes: Sequence[RowShape],
    micro_batch: int,
) -> Callable[[int], list[Batch]]:
    """Returns step -> the micro-batches of that update."""

    def batches(step: int) -> list[Batch]:
        items = [item(int(i)) for i in batch_indices(seed, step, examples, batch_size)]
        return [batch for batch, _ in micro_batches(items, layout, shapes, min(micro_batch, batch_size))]

    return batches
