"""The packer: every unit in one row, no row too full, few shapes that take everything they were planned for."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.data.loader import PASS, batch_indices, plan_shapes, plan_updates
from ctpd_jax.data.packing import (
    SAMPLE,
    PackingConfig,
    Units,
    choose_shapes,
    cost,
    fit,
    in_words,
    needs_of,
    pack,
    split,
    units_of,
)  # fmt: skip
from ctpd_jax.data.rows import LAYOUTS, BatchShape, PairItem, ScoredResponse
from ctpd_jax.errors import UserError


def make_items(rng: np.random.Generator, count: int, sides: int = 2, longest: int = 40) -> list[PairItem]:
    """Their chosen response says which one it is: all its tokens are the item's number."""

    def response(value: int) -> ScoredResponse:
        n = int(rng.integers(1, longest))
        return ScoredResponse(np.full(n, value, np.int32), np.ones(n, np.float32), value, value)

    return [
        PairItem(np.ones(int(rng.integers(1, 9)), np.int32), response(i), response(i) if sides == 2 else None)
        for i in range(count)
    ]


def random_units(rng: np.random.Generator, batches: int, units: int) -> Units:
    needs = rng.integers(1, 30, (batches * units, 1, 1)) + np.array([0, 0])
    needs[:, :, 0] += rng.integers(1, 10, needs.shape[:2])
    sizes = [int(rng.integers(1, units + 1)) for _ in range(batches)]
    return units_of(needs, [np.arange(units * b, units * b + n) for b, n in enumerate(sizes)])


many = given(seed=st.integers(0, 10_000), batches=st.integers(1, 6), units=st.integers(1, 20))


@many
@settings(max_examples=60, deadline=None)
def test_every_unit_lies_in_one_row_and_no_row_takes_too_much(seed, batches, units):
    rng = np.random.default_rng(seed)
    found = random_units(rng, batches, units)
    length, scored = rng.integers(40, 90, batches), rng.integers(30, 80, batches)
    places = pack(found, length, scored)
    assert ((places >= 0) == (found.tokens > 0)).all()
    for own, tokens, slots, most, most_scored in zip(places, found.tokens, found.scored, length, scored):
        rows = own.max() + 1
        in_rows = [own == row for row in range(rows)]
        assert all(which.any() for which in in_rows)  # none is skipped
        assert all(tokens[which].sum() <= most and slots[which].sum() <= most_scored for which in in_rows)
        # No two rows would have fitted into one: the bound of every rule that opens a row only where none takes a unit.
        assert rows < 2 * (tokens.sum() / most + slots.sum() / most_scored) + 1


@many
@settings(max_examples=40, deadline=None)
def test_a_micro_batch_is_packed_as_if_it_were_alone(seed, batches, units):
    """So the place of a unit, and with it the numbers, do not depend on what was planned beside it."""
    found = random_units(np.random.default_rng(seed), batches, units)
    places = pack(found, np.full(batches, 60), np.full(batches, 45))
    for number in range(batches):
        alone = pack(found.part(np.array([number])), np.array([60]), np.array([45]))
        assert alone[0].tolist() == places[number].tolist()


@given(
    seed=st.integers(0, 10_000), count=st.integers(1, 40), micro_batch=st.integers(1, 12), packed=st.booleans(),
    layout=st.sampled_from(LAYOUTS), buckets=st.integers(1, 4), row_multiple=st.sampled_from([1, 2, 8]),
    sides=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_planned_shapes_take_every_micro_batch(
    seed, count, micro_batch, packed, layout, buckets, row_multiple, sides
):
    rng = np.random.default_rng(seed)
    rows = PackingConfig(layout, packed, buckets, 8, row_multiple=row_multiple)
    items = make_items(rng, count, sides)
    batch_size = int(rng.integers(1, count + 1))
    updates = [batch_indices(seed, step, count, batch_size) for step in range(5)]
    shapes = plan_shapes(items, updates, micro_batch, rows)
    assert 1 <= len(shapes) <= buckets
    assert [cost(shape) for shape in shapes] == sorted(cost(shape) for shape in shapes)
    for shape in shapes:
        assert shape.rows % row_multiple == shape.length % 8 == shape.scored % 8 == 0
        assert shape.scored <= shape.length
    planned = plan_updates(items, seed, 5, batch_size, micro_batch, rows)
    batches = planned.batches
    assert planned.shapes == shapes
    for step, expected in enumerate(updates):
        seen: list[int] = []
        for batch in batches(step):
            assert BatchShape(*batch.tokens.shape, batch.target.shape[1]) in shapes
            assert batch.real.shape == (min(micro_batch, batch_size),)
            for number in range(int(batch.real.sum())):
                own = batch.pair == number
                (item,) = set(batch.target[own].tolist())  # both sides are here
                assert own.sum() == sum(len(r.tokens) for r in items[item].responses)
                assert batch.constant[number].tolist() == ([item, item] if sides == 2 else [item, 0])
                seen.append(item)
        assert sorted(seen) == sorted(expected.tolist())  # exactly the pairs of that update
        for batch, again in zip(batches(step), batches(step)):
            np.testing.assert_array_equal(batch.tokens, again.tokens)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 24), most=st.integers(1, 12), buckets=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_a_pass_takes_as_many_pairs_as_cost_least(seed, count, most, buckets):
    items = make_items(np.random.default_rng(seed), count)
    parts = [batch_indices(seed, step, count, count) for step in range(3)]

    def laid_out(size: int) -> float:
        updates = plan_updates(items, seed, 3, count, size, PackingConfig("shared", False, buckets, 8))
        batches = [batch for step in range(3) for batch in updates.batches(step)]
        return sum(cost(BatchShape(*batch.tokens.shape, batch.target.shape[1])) + PASS for batch in batches)

    planned = plan_updates(items, seed, 3, count, most, PackingConfig("shared", False, buckets, 8, fewer=True))
    sizes = [min(most, count)]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    costs = {size: laid_out(size) for size in sizes}
    assert planned.micro_batch == min(sizes, key=lambda size: (costs[size], -size))  # of equal ones, the fewest passes
    seen = [batch.constant[: int(batch.real.sum()), 0].astype(int).tolist() for batch in planned.batches(2)]
    assert sorted(np.concatenate(seen).tolist()) == sorted(parts[2].tolist())
    assert max(map(len, seen)) <= planned.micro_batch


def test_short_pairs_stay_together_and_long_ones_of_many_lengths_do_not():
    def chosen(lengths: list[int]) -> int:
        items = []
        for length in lengths:
            response = ScoredResponse(np.ones(length, np.int32), np.ones(length, np.float32), 0, 0)
            items.append(PairItem(np.ones(1, np.int32), response, response))
        return plan_updates(items, 0, 8, 4, 4, PackingConfig("shared", False, 4, 16, fewer=True)).micro_batch

    assert chosen([16, 20, 24, 28] * 4) == 4
    assert chosen([100, 300, 500, 900] * 4) == 1


def test_packed_groups_are_about_equally_large():
    needs = needs_of(make_items(np.random.default_rng(0), 64), "response")
    groups = split(needs, 8, packed=True)
    assert sorted(np.concatenate(groups).tolist()) == list(range(64)) and [len(group) for group in groups] == [8] * 8
    sums = np.array([needs[group, :, 0].sum() for group in groups])
    assert np.ptp(sums) < 0.05 * sums.mean()
    shortest_first = [needs[group, :, 0].sum() for group in split(needs, 8, packed=False)]
    assert np.ptp(shortest_first) > 0.5 * sums.mean()
    assert max(map(len, split(needs[:13], 5, packed=True))) <= 5


def spent(units: Units, rows: PackingConfig) -> float:
    shapes = choose_shapes(units, rows)
    choice, _ = fit(units, shapes, rows)
    return sum(cost(shapes[number]) for number in choice)


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_cost_less_the_more_there_may_be(packed):
    needs = needs_of(make_items(np.random.default_rng(4), 400, longest=200), "response")
    units = units_of(needs, [np.arange(8 * b, 8 * b + 8) for b in range(50)])
    costs = [spent(units, PackingConfig("response", packed, buckets, 8)) for buckets in (1, 2, 4, 8)]
    assert costs == sorted(costs, reverse=True) and costs[0] > 1.02 * costs[-1]


def test_the_shapes_are_nearly_the_best_there_are():
    """Against all triples of lengths, where each micro-batch is one unit."""
    excess = []
    for seed in range(40):
        tokens = 8 * np.random.default_rng(seed).integers(1, 16, 32)
        units = units_of(np.stack([tokens, 0 * tokens + 8], axis=1)[:, None], [[i] for i in range(32)])
        best = min(
            sum(cost(BatchShape(1, min(length for length in three if length >= n), 8)) for n in tokens.tolist())
            for three in combinations_with_replacement(np.unique(tokens).tolist(), 3)
            if tokens.max() in three
        )
        excess.append(spent(units, PackingConfig("shared", packed=False, buckets=3, multiple=8)) / best - 1)
    # The first choice alone, without an exchange, would be 0.6% above the best on average.
    assert min(excess) > -1e-9 and np.mean(excess) < 0.003 and max(excess) < 0.05


def test_a_shape_has_to_save_what_its_program_costs():
    items = make_items(np.random.default_rng(3), 96, longest=400)
    parts = [batch_indices(0, step, 96, 4) for step in range(24)]

    def chosen(program: float, buckets: int = 12) -> tuple[int, float]:
        rows = PackingConfig("shared", False, buckets, 8, program=program)
        units = units_of(needs_of(items, "shared"), [part[[i]] for part in parts for i in range(4)])
        return len(choose_shapes(units, rows)), spent(units, rows)

    counts, costs = zip(*(chosen(program) for program in (0, 100, 400, 1600, 6400, 1e9)))
    assert counts[0] == 12 and counts[-1] == 1 and sorted(counts, reverse=True) == list(counts) and len(set(counts)) > 3
    # Of two numbers of shapes the one that is taken costs less, its programs included.
    for program, count, cost_ in zip((100, 400, 1600, 6400), counts[1:], costs[1:]):
        for other in {1, count - 1} - {0, count}:
            assert cost_ + count * program < chosen(0, other)[1] + other * program


def test_packing_leaves_little_padding():
    needs = needs_of(make_items(np.random.default_rng(4), 1600, longest=200), "response")
    units = units_of(needs, [np.arange(16 * b, 16 * b + 16) for b in range(100)])
    padding = {}
    for packed in (False, True):
        rows = PackingConfig("response", packed, 4, 8)
        shapes = choose_shapes(units, rows)
        choice, _ = fit(units, shapes, rows)
        size = sum(shapes[number].rows * shapes[number].length for number in choice)
        padding[packed] = 1 - units.tokens.sum() / size
    assert padding[True] < 0.1 < 0.4 < padding[False]


def test_a_late_long_pair_is_planned_for():
    """The kinds of rows are compared on the beginning; what comes after it must fit all the same."""
    items = make_items(np.random.default_rng(0), SAMPLE + 100)
    items.append(make_items(np.random.default_rng(1), 1, longest=3)[0]._replace(prompt=np.ones(300, np.int32)))
    parts = [[i] for i in range(len(items))]  # one unit each
    for rows in (PackingConfig("shared", packed=True), PackingConfig("shared", packed=False)):
        shapes = plan_shapes(items, parts, 1, rows)
        needs = needs_of(items, "shared")
        fit(units_of(needs, parts), shapes, rows)
        assert max(shape.length for shape in shapes) >= 300


def test_a_length_that_is_given_is_kept():
    items = make_items(np.random.default_rng(0), 20)
    for packed in (False, True):
        shapes = plan_shapes(items, [range(20)], 5, PackingConfig("shared", packed, length=200))
        assert {shape.length for shape in shapes} == {200}
    with pytest.raises(UserError, match=r"config\.rows\.length is 30, but a row has to take \d+ tokens at once"):
        plan_shapes(items, [range(20)], 5, PackingConfig("shared", length=30))


def test_much_padding_is_told_with_what_lowers_it():
    """16 pairs over 16 devices, in rows that a pair fits: about half of every row stays empty."""
    rng = np.random.default_rng(0)
    tokens = np.sort(rng.integers(300, 800, (8, 16)), axis=1)[:, ::-1]
    units = Units(tokens, tokens - 100, np.broadcast_to(np.arange(16), tokens.shape))
    shares = {}
    for length in (1024, 0):
        rows = PackingConfig("shared", True, length=length, multiple=128, row_multiple=16)
        shapes = choose_shapes(units, rows)
        laid_out = np.array([shape.rows * shape.length for shape in shapes])[fit(units, shapes, rows)[0]].sum()
        shares[length] = 1 - units.tokens.sum() / laid_out
    assert shares[1024] > 0.4 and shares[0] < shares[1024]
    assert "rows.length=0" in in_words(shares[1024]) and in_words(0.12) == "12% of the tokens in rows are padding."


def test_the_pairs_of_an_update_alone_fit_the_shapes_that_were_planned():
    items = [item._replace(id=f"pair {n}") for n, item in enumerate(make_items(np.random.default_rng(0), 9))]
    updates = plan_updates(items, 0, 2, 4, 4, PackingConfig("shared", False, 2, 8))
    sizes = {(shape.rows, shape.length, shape.scored) for shape in updates.shapes}
    for step in range(2):
        alone = list(updates.alone(step))
        assert [name for name, _ in alone] == [f"pair {n}" for n in batch_indices(0, step, 9, 4)]
        for name, batch in alone:
            assert (*batch.tokens.shape, batch.target.shape[1]) in sizes and batch.real.tolist() == [1, 0, 0, 0]
            assert set(batch.target[batch.pair == 0].tolist()) == {int(name.split()[1])}
