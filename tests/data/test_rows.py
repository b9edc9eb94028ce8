"""Rows of every layout hold every scored token once, behind the right predictor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.data.loader import batch_indices, micro_batches, plan_shapes, steps_per_epoch
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import LAYOUTS, BatchShape, PairItem, ScoredResponse, build_batch, unit_needs
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), room=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_every_token_is_scored_once_after_its_own_context(layout, packed, seed, count, room):
    rng = np.random.default_rng(seed)
    items = [random_item(rng) for _ in range(count)]
    rows = PackingConfig(layout, packed, buckets=3, multiple=8)
    shapes = plan_shapes(items, [range(count)], count + room, rows)
    ((batch, places),) = micro_batches(items, count + room, rows, shapes)
    assert batch.real.tolist() == [1.0] * count + [0.0] * room
    assert BatchShape(*batch.tokens.shape, batch.target.shape[1]) in shapes
    scored = 0
    for number, item in enumerate(items[place] for place in places):
        in_rows = set()
        for side, response in enumerate(item.responses):
            in_row, slots = np.nonzero((batch.pair == number) & (batch.side == side))
            assert batch.target[in_row, slots].tolist() == response.tokens.tolist()
            assert batch.weight[in_row, slots].tolist() == response.weights.tolist()
            assert batch.constant[number, side] == np.float32(response.constant)
            assert batch.start[number, side] == np.float32(response.start)
            for t, (row, slot) in enumerate(zip(in_row, slots)):
                place = int(batch.predictor[row, slot])
                context = item.prompt.tolist() + response.tokens[:t].tolist()
                assert seen_by(batch, row, place) == context
                assert batch.layout.positions[row, place] == len(context) - 1
            scored += len(slots)
            in_rows |= set(in_row.tolist())
        assert len(in_rows) == 1 or layout == "response"
    assert scored == (batch.pair >= 0).sum()
    assert not batch.weight[batch.pair < 0].any()
    copies = 1 if layout == "shared" else 2
    tokens = sum(copies * len(item.prompt) + sum(len(r.tokens) for r in item.responses) for item in items)
    assert (batch.layout.segment > 0).sum() == tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_segment_is_one_piece_whose_positions_rise_by_one(layout):
    rng = np.random.default_rng(2)
    items = [random_item(rng) for _ in range(6)]
    rows = PackingConfig(layout, packed=True, multiple=8, length=88)
    ((batch, _),) = micro_batches(items, 6, rows, plan_shapes(items, [range(6)], 6, rows))
    assert batch.layout.segment.max() > 2
    for segment, parent, positions in zip(*(batch.layout[i] for i in (1, 2, 0))):
        for number in range(1, segment.max() + 1):
            (places,) = np.nonzero(segment == number)
            assert np.diff(places).tolist() == np.diff(positions[places]).tolist() == [1] * (len(places) - 1)
            (above,) = set(parent[places].tolist())
            if layout != "shared" or above == number:
                assert above == number and positions[places[0]] == 0  # with a prompt of its own, or a prompt
            else:
                assert set(parent[segment == above].tolist()) == {above}
                assert positions[places[0]] == (segment == above).sum()  # it goes on behind the prompt


def test_without_places_every_unit_has_a_row_of_its_own():
    items = [random_item(np.random.default_rng(seed)) for seed in range(3)]
    for layout, each in (("response", 2), ("shared", 1)):
        batch = build_batch(items, layout, BatchShape(8, 64, 32), 4)
        for number in range(3):
            found = np.unique(np.nonzero(batch.pair == number)[0])
            assert found.tolist() == list(range(each * number, each * number + each))


def test_shared_prompts_save_a_copy():
    item = random_item(np.random.default_rng(0))
    lengths = {layout: sum(tokens for tokens, _ in unit_needs(item, layout)) for layout in LAYOUTS}
    assert lengths["response"] == lengths["shared"] + len(item.prompt)


def test_unknown_layout_and_impossible_row_are_named():
    item = random_item(np.random.default_rng(0))
    with pytest.raises(UserError, match=r"rows\.layout is 'packed'"):
        plan_shapes([item], [[0]], 1, PackingConfig("packed"))
    with pytest.raises(UserError, match="There is no pair left"):
        plan_shapes([], [[]], 1, PackingConfig())
    with pytest.raises(UserError, match="fits none of the shapes"):
        list(micro_batches([item], 1, PackingConfig("shared"), [BatchShape(1, 2, 2)]))


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


def test_unpacked_micro_batches_are_sorted_by_length_and_tell_where_pairs_went():
    rng = np.random.default_rng(1)
    items = [random_item(rng) for _ in range(7)]
    rows = PackingConfig("shared", buckets=3, multiple=4)
    seen, lengths = [], []
    for batch, places in micro_batches(items, 2, rows, plan_shapes(items, [range(7)], 2, rows)):
        lengths.append(batch.tokens.shape[1])
        for number, place in enumerate(places):
            in_row, slots = np.nonzero((batch.pair == number) & (batch.side == 0))
            assert batch.target[in_row, slots].tolist() == items[place].chosen.tokens.tolist()
        seen += places
    assert sorted(seen) == list(range(7))
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
