"""Packed rows, with and without shared prompts, give the values and gradients of one response a row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny import random_model

from ctpd_jax.annotate.scorer import make_scorer, score_pairs
from ctpd_jax.data.loader import micro_batches, plan_shapes
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import LAYOUTS, PairItem, ScoredResponse
from ctpd_jax.models.compute import Compute
from ctpd_jax.train.sums import Objective, preference_sums

PAIRS = 5
ALONE = PackingConfig("response", packed=False, buckets=1, multiple=8)


def packed(layout: str, row_multiple: int = 1) -> PackingConfig:
    return PackingConfig(layout, packed=True, buckets=1, multiple=8, length=96, row_multiple=row_multiple)


def make_items(vocabulary: int) -> list[PairItem]:
    rng = np.random.default_rng(3)

    def response() -> ScoredResponse:
        n = int(rng.integers(2, 18))
        ids, weights = rng.integers(3, vocabulary, n).astype(np.int32), rng.uniform(0.5, 2, n).astype(np.float32)
        return ScoredResponse(ids, weights, float(rng.normal(-80, 5)), float(rng.normal(-80, 5)))

    prompts = [rng.integers(3, vocabulary, int(rng.integers(1, 12))).astype(np.int32) for _ in range(PAIRS)]
    return [PairItem(prompt, response(), response()) for prompt in prompts]


def one_batch(items: list[PairItem], rows: PackingConfig):
    ((batch, places),) = micro_batches(items, PAIRS, rows, plan_shapes(items, [range(PAIRS)], PAIRS, rows))
    assert sorted(places) == list(range(PAIRS))
    return batch


def update(config, params, batch):
    """Loss, gradient and logged sums of all pairs."""
    sums_of = partial(preference_sums, config, Objective(0.1, label_smoothing=0.1, sft_weight=0.3), Compute())
    (loss, sums), gradient = jax.jit(jax.value_and_grad(sums_of, has_aux=True))(params, batch)
    return loss, sums, gradient


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_rows_give_the_same_update(name):
    config, params = random_model(name)
    items = make_items(config.vocab_size)
    loss, sums, gradient = update(config, params, one_batch(items, ALONE))
    for rows in (packed("response"), packed("shared", row_multiple=4)):
        batch = one_batch(items, rows)
        pairs_of_rows = [set(row[row >= 0].tolist()) for row in batch.pair]
        assert max(map(len, pairs_of_rows)) > 2 and len(batch.tokens) % rows.row_multiple == 0
        other_loss, other_sums, other_gradient = update(config, params, batch)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        for key in sums.keys() - {"num_tokens", "padding"}:
            np.testing.assert_allclose(other_sums[key], sums[key], rtol=1e-5, atol=1e-5, err_msg=key)
        for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient)):
            assert jnp.max(jnp.abs(a - b)) < 1e-4 * jnp.max(jnp.abs(b))
        used = batch.layout.segment > 0
        np.testing.assert_allclose(other_sums["padding"], [np.sum(~used), used.size])


def test_a_response_that_saw_its_neighbour_would_be_noticed():
    """Else the test above would say nothing: one segment for the whole row changes the loss."""
    config, params = random_model("llama")
    batch = one_batch(make_items(config.vocab_size), packed("response"))
    ones = np.minimum(batch.layout.segment, 1)
    leaking = batch._replace(layout=batch.layout._replace(segment=ones, parent=ones))
    whole, wrong = (preference_sums(config, Objective(0.1), Compute(), params, b)[0] for b in (batch, leaking))
    assert abs(float(whole - wrong)) > 1e-3 * abs(float(whole))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_annotation_gives_the_same_spans(layout):
    config, params = random_model("gemma3")
    items = make_items(config.vocab_size)
    rng = np.random.default_rng(5)
    spans = [tuple(np.sort(rng.integers(0, 6, len(r.tokens))) for r in item.responses) for item in items]
    spans = [tuple(np.unique(s, return_inverse=True)[1] for s in both) for both in spans]  # 0..S-1, none empty
    scorer = partial(make_scorer(config, Compute()), {}, params)

    def measured(rows: PackingConfig, micro_batch: int):
        shapes = plan_shapes(items, [range(PAIRS)], micro_batch, rows)
        (found,) = score_pairs(scorer, items, spans, micro_batch, rows, shapes)
        return [values for both in found for values in both]

    for one, other in zip(measured(packed(layout), 3), measured(ALONE, PAIRS), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
