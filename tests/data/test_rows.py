"""Rows of every layout hold every scored token once, behind the right predictor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.data.loader import batch_indices, micro_batches, steps_per_epoch
from ctpd_jax.data.rows import (
    LAYOUTS,
    PairItem,
    RowShape,
    ScoredResponse,
    build_batch,
    choose_shapes,
    row_needs,
    smallest_shape,
)
from ctpd_jax.errors import UserError


def random_item(rng: np.random.Generator) -> PairItem:
    def response() -> ScoredResponse:
        n = int(rng.integers(1, 12))
        return ScoredResponse(
            rng.integers(1, 99, n).astype(np.int32), rng.random(n, np.float32), float(rng.random()), float(rng.random())
        )

    return PairItem(rng.integers(1, 99, int(rng.integers(1, 9))).astype(np.int32), response(), response())


def seen_by(batch, row: int, place: int) -> list[int]:
    """The tokens that a row position attends to, itself included, by the rule of RowLayout."""
    segment, parent = batch.layout.segment[row], batch.layout.parent[row]
    return [
        int(batch.tokens[row, j])
        for j in range(place + 1)
        if segment[j] and segment[j] in (segment[place], parent[place])
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), room=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_every_token_is_scored_once_after_its_own_context(layout, seed, count, room):
    rng = np.random.default_rng(seed)
    items = [random_item(rng) for _ in range(count)]
    shapes = choose_shapes(items, layout, buckets=3, multiple=8)
    batch = build_batch(items, layout, smallest_shape(items, layout, shapes), count + room)
    assert batch.real.tolist() == [1.0] * count + [0.0] * room
    scored = 0
    for number, item in enumerate(items):
        for side, response in enumerate(item.responses):
            rows, slots = np.nonzero((batch.pair == number) & (batch.side == side))
            assert batch.target[rows, slots].tolist() == response.tokens.tolist()
            assert batch.weight[rows, slots].tolist() == response.weights.tolist()
            assert batch.constant[number, side] == np.float32(response.constant)
            assert batch.start[number, side] == np.float32(response.start)
            for t, (row, slot) in enumerate(zip(rows, slots)):
                place = int(batch.predictor[row, slot])
                context = item.prompt.tolist() + response.tokens[:t].tolist()
                assert seen_by(batch, row, place) == context
                assert batch.layout.positions[row, place] == len(context) - 1
            scored += len(rows)
    assert scored == (batch.pair >= 0).sum()
    assert not batch.weight[batch.pair < 0].any()


def test_shared_prompts_save_a_copy():
    item = random_item(np.random.default_rng(0))
    lengths = {layout: sum(need.length for need in row_needs(item, layout)) for layout in LAYOUTS}
    assert lengths["response"] == lengths["pair"] == lengths["shared"] + len(item.prompt)


def test_unknown_layout_and_impossible_row_are_named():
    item = random_item(np.random.default_rng(0))
    with pytest.raises(UserError, match=r"rows\.layout is 'packed'"):
        choose_shapes([item], "packed", 1, 8)
    with pytest.raises(UserError, match="fits none of the shapes"):
        smallest_shape([item], "pair", [RowShape(2, 2)])


@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_an_epoch_visits_every_example_at_most_once(seed, examples, batch_size):
    if examples < batch_size:
        with pytest.raises(UserError, match="do not fill one batch"):
            steps_per_epoch(examples, batch_size)
        return
    steps = steps_per_epoch(examples, batch_size)
    epochs = [
        np.concatenate([batch_indices(seed, epoch * steps + s, examples, batch_size) for s in range(steps)])
        for epoch in range(2)
    ]
    for seen in epochs:
        assert len(set(seen.tolist())) == steps * batch_size <= examples
    if examples > 8:
        assert epochs[0].tolist() != epochs[1].tolist()


def test_micro_batches_sort_by_length_and_tell_where_pairs_went():
    rng = np.random.default_rng(1)
    items = [random_item(rng) for _ in range(7)]
    shapes = choose_shapes(items, "pair", buckets=3, multiple=4)
    seen, lengths = [], []
    for batch, places in micro_batches(items, "pair", shapes, 2):
        lengths.append(batch.tokens.shape[1])
        for number, place in enumerate(places):
            rows, slots = np.nonzero((batch.pair == number) & (batch.side == 0))
            assert batch.target[rows, slots].tolist() == items[place].chosen.tokens.tolist()
        seen += places
    assert sorted(seen) == list(range(7))
    assert lengths == sorted(lengths)
