"""What the objectives make of a finished run's annotations, against the definitions in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import MICRO

from ctpd_jax.annotate.coefficients import training_items
from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import load_config
from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES

TEACHER_BETA = 0.3


@pytest.fixture(scope="module")
def examples(finished_micro):
    store = open_store(finished_micro / "annotations", {})
    return [store[i] for i in range(len(store))]


def items_of(examples, *overrides, **train):
    config = load_config(MICRO, overrides)
    config.train.update(train)
    return training_items(examples, config.weights, config.train, 0, TEACHER_BETA)


def column(examples, name):
    """Of every pair the two responses' log-probabilities, [B, 2]."""
    return np.array([[scores[side][name].sum(dtype=np.float64) for side in SIDES] for _, scores in examples])


def constants(items):
    return np.array([[response.constant for response in item.responses] for item in items])


def margins(examples):
    rewards = TEACHER_BETA * (column(examples, "positive") - column(examples, "reference"))
    return rewards[:, CHOSEN] - rewards[:, REJECTED]


def test_the_papers_objective_needs_nothing_more(examples):
    items, figures = items_of(examples)
    assert {(item.label, item.weight, item.chosen.targets is None) for item in items} == {(None, None, True)}
    assert not {"anchor/kappa", "teacher/agrees"} & figures.keys()


def test_regression_targets_and_the_starts_constants(examples):
    items, _ = items_of(examples, objective="regression", tau=0.5, target_clip=1.0)
    for item, (pair, scores) in zip(items, examples):
        for response, side, number in zip(item.responses, SIDES, (CHOSEN, REJECTED)):
            own = scores[side]
            expected = own["start"] + 0.5 * np.clip(own["positive"] - own["reference"], -1, 1)
            np.testing.assert_allclose(response.targets, expected, rtol=1e-6)
            np.testing.assert_array_equal(response.span_ids, pair.response(number).student.span_ids)


def test_the_contrast_may_be_that_of_the_pair(examples):
    items, _ = items_of(examples, objective="regression", contrast="negative", target_clip=1e9)
    for item, (_, scores) in zip(items, examples):
        own = scores["rejected"]
        np.testing.assert_allclose(item.rejected.targets, own["start"] + own["positive"] - own["negative"], rtol=1e-5)


def test_one_teacher_weighs_against_its_own_start(examples):
    items, _ = items_of(examples, "--config.weights.source=dpo_reference")
    for item, (pair, scores) in zip(items, examples):
        own = scores["chosen"]
        expected = np.exp(np.clip(own["positive"] - own["reference"], -0.5, 1.5))
        np.testing.assert_allclose(item.chosen.weights, expected[pair.chosen.student.span_ids], rtol=1e-5)


def test_a_calibrated_anchor_has_the_stated_spread(examples):
    """The policy begins as the start: its margin there is that of the start's constants."""
    starts = constants(items_of(examples, reference="student")[0])
    for spread, kappa in ((0.5, None), (1e6, 1.0)):  # far more than there is: the paper's anchor
        items, figures = items_of(examples, objective="calibrated", spread=spread, beta=0.2)
        returns = starts - constants(items)
        logits = 0.2 * (returns[:, CHOSEN] - returns[:, REJECTED])
        if kappa is None:
            assert np.sqrt(np.mean(logits**2)) == pytest.approx(spread, rel=1e-3) and 0 < figures["anchor/kappa"] < 1
        else:
            assert figures["anchor/kappa"] == kappa
            np.testing.assert_allclose(constants(items), constants(items_of(examples)[0]), rtol=1e-6)


def test_the_teachers_margin_as_label_weight_and_offset(examples):
    m = margins(examples)
    labels = [item.label for item in items_of(examples, objective="margin", trust=0.5)[0]]
    np.testing.assert_allclose(labels, 0.5 + 0.5 / (1 + np.exp(-m)), rtol=1e-4)
    weights = [item.weight for item in items_of(examples, objective="margin", margin_as="weight")[0]]
    np.testing.assert_allclose(weights, 1 / (1 + np.exp(-m)) / np.mean(1 / (1 + np.exp(-m))), rtol=1e-4)

    # An offset lies in the chosen response's constant: beta h - trust m.
    plain = constants(items_of(examples, objective="margin", margin_as="none")[0])
    items = items_of(examples, objective="margin", margin_as="offset", trust=0.5, offset=0.25, beta=0.2)[0]
    moved = constants(items) - plain
    np.testing.assert_allclose(0.2 * moved[:, CHOSEN], 0.25 + 0.5 * m, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(moved[:, REJECTED], 0)


def with_worth(examples, **worth):
    own = [dict(zip(worth, values, strict=True)) for values in zip(*worth.values(), strict=True)]
    return [(replace(pair, **values), scores) for (pair, scores), values in zip(examples, own, strict=True)]


def test_weights_and_margins_of_the_data(examples):
    margins, weights = np.linspace(-2, 3, len(examples)), np.linspace(0.5, 1.5, len(examples))
    worthy = with_worth(examples, margin=margins, weight=weights)
    of_data = {"objective": "margin", "margin_from": "data", "trust": 0.5}
    items, _ = items_of(worthy, **of_data)
    np.testing.assert_allclose([item.label for item in items], 0.5 + 0.5 / (1 + np.exp(-margins)), rtol=1e-5)
    np.testing.assert_allclose([item.weight for item in items], weights)
    with pytest.raises(UserError, match=f"Pair {examples[3][0].id} has no margin"):
        items_of(with_worth(worthy, margin=[*margins[:3], None, *margins[4:]]), **of_data)


def test_without_the_teachers_margin_it_is_anchored_at_the_start(examples):
    one = constants(items_of(examples, objective="margin", margin_as="none")[0])
    np.testing.assert_array_equal(one, constants(items_of(examples, reference="student")[0]))
