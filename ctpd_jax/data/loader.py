"""Batches addressed by step: which examples an update sees is a function of (seed, step) and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ctpd_jax.data.packing import PackingConfig, Units, choose_shapes, cost, fit, needs_of, split, units_of
from ctpd_jax.data.rows import BatchShape, PairItem, build_batch
from ctpd_jax.errors import UserError
from ctpd_jax.schema import Batch

PASS = 64  # tokens that take as long as adding a gradient to another one, on a CPU
Items = Sequence[PairItem]
Parts = Iterable[Sequence[int] | np.ndarray]  # updates, or shards: the places of their items


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the whole batches of an epoch; what is left over waits for the next epoch's order."""
    if examples < batch_size:
        raise UserError(f"{examples} examples do not fill one batch of {batch_size}: lower batch_size or add data.")
    return examples // batch_size


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, step: int, examples: int, batch_size: int) -> np.ndarray:
    """Return the examples of update `step` (counted from 0): int64 [batch_size].

    index = permutation(seed, epoch)[(step mod steps_per_epoch) * batch_size + i], so a resumed run, on any number of
    hosts, sees what the undisturbed one would have seen.
    """
    epoch, place = divmod(step, steps_per_epoch(examples, batch_size))
    return _order(seed, epoch, examples)[place * batch_size : (place + 1) * batch_size]


def plan_shapes(items: Items, parts: Parts, micro_batch: int, packing: PackingConfig) -> tuple[BatchShape, ...]:
    """Choose the shapes of all micro-batches of a stage before it begins, so that none of them can exceed them.

    parts: what `micro_batches` will be asked for.
    """
    return choose_shapes(_units(items, parts, micro_batch, packing), packing)


def padding(
    items: Items, parts: Parts, micro_batch: int, packing: PackingConfig, shapes: Sequence[BatchShape]
) -> float:
    """Return the share of the tokens laid out that is padding, over such parts."""
    units, sizes = _units(items, parts, micro_batch, packing), np.array([shape.rows * shape.length for shape in shapes])
    return 1 - float(units.tokens.sum() / sizes[fit(units, shapes, packing)[0]].sum())


def _units(items: Items, parts: Parts, micro_batch: int, packing: PackingConfig) -> Units:
    # Each update, or shard, is cut into micro-batches by itself.
    needs = needs_of(items, packing.layout)
    groups: list[np.ndarray] = []
    for part in map(np.asarray, parts):
        groups += [part[group] for group in split(needs[part], micro_batch, packing.packed)]
    return units_of(needs, groups)


def micro_batches(
    items: Items, micro_batch: int, packing: PackingConfig, shapes: Sequence[BatchShape]
) -> Iterator[tuple[Batch, list[int]]]:
    """Cut items into batches of at most `micro_batch` pairs, each in the cheapest of the shapes that takes it.

    Yields the batch, which has room for `micro_batch` pairs, and the places of its pairs in `items`.
    """
    needs = needs_of(items, packing.layout)
    groups = split(needs, micro_batch, packing.packed)
    choice, places = fit(units_of(needs, groups), shapes, packing)
    for group, number, own in zip(groups, choice, places):
        yield build_batch([items[i] for i in group], packing.layout, shapes[number], micro_batch, own), group.tolist()


@dataclass(frozen=True)
class Updates:
    """The micro-batches of every update of a stage."""

    batches: Callable[[int], list[Batch]]  # of an update, counted from 0
    alone: Callable[[int], Iterable[tuple[str, Batch]]]  # likewise, pair by pair: its id, a batch that holds it alone
    micro_batch: int  # pairs of a pass, at most
    shapes: tuple[BatchShape, ...]  # no batch has another one: a program is compiled for each
    padding: float  # share of the tokens laid out, over the first updates


def plan_updates(
    items: Sequence[PairItem],
    seed: int,
    steps: int,
    batch_size: int,
    micro_batch: int,
    packing: PackingConfig,
    beside: Callable[[Batch, Sequence[int]], Batch] = lambda batch, places: batch,
) -> Updates:
    """Decides which items each update sees, how many in a pass and in which shapes, before the first of them.

    beside: lays more into a batch, given the places of its pairs in `items`.
    """

    def parts(steps: int) -> list[np.ndarray]:
        return [batch_indices(seed, step, len(items), batch_size) for step in range(steps)]

    # All updates are looked at: one late long pair would need a shape that nobody has compiled.
    micro_batch, shapes = _pairs_of_a_pass(items, parts(steps), min(micro_batch, batch_size), packing)

    def laid_out(places: np.ndarray) -> list[Batch]:
        found = micro_batches([items[int(i)] for i in places], micro_batch, packing, shapes)
        return [beside(batch, places[own].tolist()) for batch, own in found]

    def batches(step: int) -> list[Batch]:
        return laid_out(batch_indices(seed, step, len(items), batch_size))

    # For whoever looks for the one that is at fault.
    def alone(step: int) -> Iterator[tuple[str, Batch]]:
        for place in batch_indices(seed, step, len(items), batch_size):
            yield items[int(place)].id, laid_out(np.array([place]))[0]

    share = padding(items, parts(min(steps, 64)), micro_batch, packing, shapes)
    return Updates(batches, alone, micro_batch, shapes, share)


def _pairs_of_a_pass(
    items: Items, parts: Parts, most: int, packing: PackingConfig
) -> tuple[int, tuple[BatchShape, ...]]:
    """Return how many pairs a pass takes, `most` or a half, a quarter, ... of it, and the shapes for that."""
    # Fewer pairs of about one length leave less padding; but every pass adds a gradient to that of the update, and
    # more lengths want more programs.
    sizes = [most]
    while packing.fewer and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    found = []
    for size in sizes:
        units = _units(items, parts, size, packing)
        shapes = choose_shapes(units, packing)
        laid_out = sum(cost(shapes[number]) + PASS for number in fit(units, shapes, packing)[0])
        found.append((laid_out + len(shapes) * packing.program, -size, shapes))
    _, size, shapes = min(found)
    return -size, shapes


def ahead(batches: Callable[[int], list[Batch]], first: int, steps: int) -> Iterator[list[Batch]]:
    """batches(first), ..., batches(steps - 1), each laid out while the devices are busy with the one before."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(batches, first)
        for step in range(first, steps):
            now = coming.result()
            if step + 1 < steps:
                coming = worker.submit(batches, step + 1)
            yield now
