"""What the objectives make of a finished run's annotations, against the definitions in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import MICRO

from ctpd_jax.annotate import coefficients
from ctpd_jax.annotate.coefficients import training_items
from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import load_config
from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES


@pytest.fixture(scope="module")
def examples(finished_micro):
    store = open_store(finished_micro / "annotations", {})
    return list(store)


def items_of(examples, *overrides, **train):
    config = load_config(MICRO, overrides)
    config.train.update(train)
    return training_items(examples, config.weights, config.train, 0)


def constants(items):
    return np.array([[response.constant for response in item.responses] for item in items])


def test_the_papers_objective_needs_nothing_more(examples):
    items, _ = items_of(examples)
    assert {(item.label, item.weight, item.chosen.targets is None) for item in items} == {(None, None, True)}


@pytest.mark.parametrize("overrides", [(), ("--config.weights.source=random",)])
def test_parts_make_no_difference(examples, overrides, monkeypatch):
    """Pairs come a few at a time, responses a few in a program, and rows that fill it up count nothing."""
    whole, figures = items_of(examples, *overrides, objective="mixed")
    monkeypatch.setattr(coefficients, "PAIRS", 3)
    monkeypatch.setattr(coefficients, "ROWS", 2)
    parts, again = items_of(iter(examples), *overrides, objective="mixed")
    assert len(parts) == len(examples) > 3
    for one, other in zip(parts, whole, strict=True):
        for a, b in zip(one.responses, other.responses, strict=True):
            np.testing.assert_allclose(a.weights, b.weights, rtol=1e-6)
            np.testing.assert_allclose(a.targets, b.targets, rtol=1e-6)
            np.testing.assert_allclose(
                [a.constant, a.start, a.reference], [b.constant, b.start, b.reference], rtol=1e-5
            )
    assert again == pytest.approx(figures, rel=1e-5)


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


def with_worth(examples, **worth):
    own = [dict(zip(worth, values, strict=True)) for values in zip(*worth.values(), strict=True)]
    return [(replace(pair, **values), scores) for (pair, scores), values in zip(examples, own, strict=True)]


def test_weights_and_margins_of_the_data(examples):
    margins, weights = np.linspace(-2, 3, len(examples)), np.linspace(0.5, 1.5, len(examples))
    worthy = with_worth(examples, margin=margins, weight=weights)
    sure = 1 / (1 + np.exp(-margins))
    items, _ = items_of(worthy, margin_as="label", trust=0.5)
    np.testing.assert_allclose([item.label for item in items], 0.5 + 0.5 * sure, rtol=1e-5)
    np.testing.assert_allclose([item.weight for item in items], weights)
    items, _ = items_of(worthy, margin_as="weight")
    np.testing.assert_allclose([item.weight for item in items], weights * sure / sure.mean(), rtol=1e-5)
    assert {item.label for item in items} == {None}

    # An offset lies in the chosen response's constant: beta h - trust m.
    items, _ = items_of(worthy, margin_as="offset", trust=0.5, offset=0.25, beta=0.2)
    moved = constants(items) - constants(items_of(worthy)[0])
    np.testing.assert_allclose(0.2 * moved[:, CHOSEN], 0.25 + 0.5 * margins, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(moved[:, REJECTED], 0)

    with pytest.raises(UserError, match=f"Pair {examples[3][0].id} has no margin: config.train.margin_as 'label'"):
        items_of(with_worth(worthy, margin=[*margins[:3], None, *margins[4:]]), margin_as="label")


@pytest.mark.parametrize("objective", ["regression", "mixed"])
def test_who_follows_the_teacher_is_held_against_the_own_start(examples, objective):
    one = constants(items_of(examples, objective=objective)[0])
    np.testing.assert_array_equal(one, constants(items_of(examples, reference="student")[0]))
