"""Tokens to spans and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.core.projection import project_to_tokens, response_sums, span_counts, span_means, span_sums

IDS = np.array([[0, 0, 1, 2, 2, 2, -1, -1], [0, 1, 1, 1, 1, 3, 3, -1]])
VALUES = np.arange(16, dtype=np.float32).reshape(2, 8)


def test_sums_means_and_counts_by_hand() -> None:
    np.testing.assert_array_equal(span_sums(VALUES, IDS, 4), [[1, 2, 12, 0], [8, 42, 0, 27]])
    np.testing.assert_array_equal(span_counts(IDS, 4), [[2, 1, 3, 0], [1, 4, 0, 2]])
    np.testing.assert_array_equal(span_means(VALUES, IDS, 4), [[0.5, 2, 4, 0], [8, 10.5, 0, 13.5]])


def test_projection_by_hand() -> None:
    spans = np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    expected = [[1, 1, 2, 3, 3, 3, 0, 0], [5, 6, 6, 6, 6, 8, 8, 0]]
    np.testing.assert_array_equal(project_to_tokens(spans, IDS), expected)
    np.testing.assert_array_equal(project_to_tokens(spans[:, :2], IDS)[0], [1, 1, 2, 0, 0, 0, 0, 0])  # ids outside
    np.testing.assert_array_equal(project_to_tokens(np.zeros((2, 0)), np.full((2, 3), -1)), np.zeros((2, 3)))


def test_what_lies_in_no_span_does_not_matter() -> None:
    poisoned = jnp.where(IDS < 0, jnp.nan, VALUES)
    np.testing.assert_array_equal(span_sums(poisoned, IDS, 4), span_sums(VALUES, IDS, 4))
    gradient = jax.grad(lambda v: span_means(v, IDS, 4).sum())(poisoned)
    np.testing.assert_allclose(gradient, project_to_tokens(1 / np.maximum(span_counts(IDS, 4), 1), IDS), rtol=1e-6)
    padding = np.array([[1.0, 2, 3, np.nan], [5, 6, np.inf, 8]])
    assert np.isfinite(project_to_tokens(padding, IDS)).all()


def test_one_response_and_more_leading_axes() -> None:
    np.testing.assert_array_equal(span_sums(VALUES[0], IDS[0], 3), [1, 2, 12])
    deep = span_sums(VALUES[None, :, None], IDS[None, :, None], 4)
    np.testing.assert_array_equal(deep[0, :, 0], span_sums(VALUES, IDS, 4))
    # One row of ids for several models' values, and one row of values for several responses.
    both = span_sums(np.stack([VALUES, 2 * VALUES]), IDS, 4)
    np.testing.assert_array_equal(both[1], 2 * both[0])
    np.testing.assert_array_equal(project_to_tokens(np.arange(4.0), IDS).shape, (2, 8))


def test_low_precision_values_are_added_in_float32() -> None:
    ones = jnp.ones(1000, jnp.bfloat16)
    total = span_sums(ones, np.zeros(1000, int), 1)
    assert total.dtype == jnp.float32 and total[0] == 1000  # bfloat16 would stop at 256


def test_responses_lie_anywhere_in_a_batch() -> None:
    """Of rows that hold several responses, and of padding of any content."""
    np.testing.assert_array_equal(response_sums(VALUES, IDS, 4), [9, 44, 12, 27])
    np.testing.assert_array_equal(response_sums(jnp.where(IDS < 0, jnp.nan, VALUES), IDS, 4), [9, 44, 12, 27])
    np.testing.assert_array_equal(response_sums(VALUES, IDS, 2), [9, 44])  # ids outside


@st.composite
def responses(draw):  # type: ignore[no-untyped-def]
    """Span ids of a response of up to eight spans in 24 places, and numbers to go with them."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    ids = [i for i, n in enumerate(counts) for _ in range(n)]
    return np.array(ids + [-1] * (24 - len(ids))), np.random.RandomState(draw(st.integers(0, 2**31 - 1)))


gradient_of_the_total = jax.jit(jax.grad(lambda values, ids: span_sums(values, ids, 8).sum()))
sums_of_eight = jax.jit(lambda values, ids: span_sums(values, ids, 8))


@settings(max_examples=25, deadline=None)
@given(responses())
def test_sum_over_spans_is_the_sum_over_covered_tokens(response) -> None:
    ids, rng = response
    values = -rng.exponential(size=ids.size).astype(np.float32)
    total = np.asarray(sums_of_eight(values, ids)).sum()
    np.testing.assert_allclose(total, values[ids >= 0].sum(), rtol=1e-6)
    gradient = gradient_of_the_total(values, ids)
    np.testing.assert_array_equal(gradient, ids >= 0)


@settings(max_examples=25, deadline=None)
@given(responses())
def test_projection_is_the_adjoint_of_the_sum(response) -> None:
    """<w, span_sums(x)> = <project(w), x>: the identity behind the token form of the return."""
    ids, rng = response
    x, w = rng.standard_normal(ids.size), rng.standard_normal(8)
    with jax.enable_x64(True):
        left, right = w @ sums_of_eight(x, ids), project_to_tokens(w, ids) @ x
    np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)
