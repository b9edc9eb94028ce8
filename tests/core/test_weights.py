"""Importance weights, their transforms and the facts of importance sampling that hold exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.core import weights

TRANSFORMS = {
    "threshold": jax.jit(weights.threshold_weights),
    "scale": jax.jit(weights.scale_weights),
    "rank": jax.jit(weights.rank_weights),
    "binary": jax.jit(weights.binary_weights),
}


def span_mask(num_spans: np.ndarray, size: int) -> np.ndarray:
    """Which of `size` padded spans are real."""
    return np.arange(size) < np.asarray(num_spans)[..., None]


def test_bounds_of_chosen_and_rejected_weights() -> None:
    """The clip comes before the sign (method: chosen in [0.61, 4.48], rejected in [0.22, 1.65])."""
    positive, negative = np.array([0.0, 0.0, -100.0]), np.array([-100.0, 0.0, 0.0])
    np.testing.assert_allclose(weights.importance_weights(positive, negative, mu=1), np.exp([1.5, 0, -0.5]), rtol=1e-6)
    np.testing.assert_allclose(weights.importance_weights(positive, negative, mu=-1), np.exp([-1.5, 0, 0.5]), rtol=1e-6)


def test_mu_and_k_broadcast_over_responses() -> None:
    positive, negative = np.array([[0.3, 0.1]] * 2), np.array([[0.1, 0.4]] * 2)
    both = weights.importance_weights(positive, negative, mu=np.array([[1.0], [-1.0]]), k=np.array([[1.0], [2.0]]))
    np.testing.assert_allclose(both, [np.exp([0.2, -0.3]), 2 * np.exp([-0.2, 0.3])], rtol=1e-6)


def test_no_clip_by_infinite_bounds() -> None:
    w = weights.importance_weights(np.array([-1.0]), np.array([-6.0]), lower=-np.inf, upper=np.inf)
    np.testing.assert_allclose(w, np.exp(5), rtol=1e-6)


def test_transforms_by_hand() -> None:
    w = np.array([0.1, 0.25, 1.0, 1.65, 4.0])
    np.testing.assert_allclose(weights.threshold_weights(w), [0.3, 0.3, 1.0, 1.6, 1.6], rtol=1e-6)
    np.testing.assert_allclose(weights.scale_weights(w), [0.3, 0.34375, 1.0, 1.56875, 1.7], rtol=1e-6)
    np.testing.assert_allclose(weights.rank_weights(w[::-1]), [2.0, 1.65, 1.3, 0.95, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(weights.binary_weights(w, percent=40), [0, 0, 0, 1, 1])


def test_equal_weights_share_their_rank_and_earlier_spans_go_first_in_binary() -> None:
    w = np.array([4.48, 0.61, 4.48, 0.61, 1.0])
    np.testing.assert_allclose(weights.rank_weights(w), [1.825, 0.775, 1.825, 0.775, 1.3], rtol=1e-6)
    np.testing.assert_array_equal(weights.binary_weights(w, percent=20), [1, 0, 0, 0, 0])


def test_a_response_of_one_span() -> None:
    np.testing.assert_allclose(weights.rank_weights(np.array([1.2])), [0.6], rtol=1e-6)
    np.testing.assert_array_equal(weights.binary_weights(np.array([1.2]), percent=10), [1])


@pytest.mark.parametrize("percent, spans, kept", [(30, 10, 3), (70, 10, 7), (10, 7, 1), (50, 5, 3), (100, 9, 9)])
def test_binary_keeps_the_share_rounded_up(percent: float, spans: int, kept: int) -> None:
    w = np.linspace(0.5, 2, spans)
    np.testing.assert_array_equal(weights.binary_weights(w, percent), [0] * (spans - kept) + [1] * kept)


# Few lengths, so that few programs are compiled.
responses = st.sampled_from([1, 2, 7]).flatmap(
    lambda n: st.lists(st.floats(0.0625, 4.5, width=32), min_size=n, max_size=n)
)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@settings(max_examples=15, deadline=None)
@given(values=responses)
def test_padding_changes_nothing_and_gets_zero(name: str, values: list[float]) -> None:
    alone = TRANSFORMS[name](np.array(values, np.float32))
    padding = 8 - len(values)
    batch = np.array([values + [np.nan] * padding, values[::-1] + [9.0] * padding], np.float32)
    masked = TRANSFORMS[name](batch, mask=span_mask(np.array([len(values)] * 2), 8))
    np.testing.assert_array_equal(masked[0, : len(values)], alone)
    np.testing.assert_array_equal(masked[:, len(values) :], 0)


@settings(max_examples=15, deadline=None)
@given(values=st.lists(st.floats(0.0625, 4.5, width=32), min_size=7, max_size=7, unique=True))
def test_rank_and_binary_depend_on_the_order_alone(values: list[float]) -> None:
    w = np.array(values, np.float32)
    monotone = 2 * w  # exact, so that no two weights become equal
    ranked = np.asarray(TRANSFORMS["rank"](w))
    np.testing.assert_array_equal(ranked, TRANSFORMS["rank"](monotone))
    np.testing.assert_array_equal(TRANSFORMS["binary"](w), TRANSFORMS["binary"](monotone))
    np.testing.assert_allclose([ranked.min(), ranked.max(), ranked.mean()], [0.6, 2.0, 1.3], rtol=1e-6)
    np.testing.assert_array_equal(np.argsort(ranked), np.argsort(w))


def test_one_compilation_serves_a_bucket_of_lengths() -> None:
    traces = []

    @jax.jit
    def padded(w: jax.Array, mask: jax.Array) -> jax.Array:
        traces.append(w.shape)
        return weights.rank_weights(w, mask=mask)

    for spans in (3, 5, 8):
        padded(jnp.ones(8), span_mask(spans, 8))
    assert traces == [(8,)]


def test_uniform_and_random() -> None:
    mask = span_mask(np.array([3, 5]), 8)
    np.testing.assert_array_equal(weights.uniform_weights(mask), mask)
    keys = jax.random.split(jax.random.key(3), 2)
    w = weights.random_weights(keys, mask)
    assert w.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(w) > 0, mask)
    real = np.asarray(w)[np.asarray(mask)]
    assert ((real >= 0.7) & (real < 1.3)).all() and len(set(real.tolist())) == 8
    # A response keeps its weights in another batch, with other padding, or alone.
    np.testing.assert_array_equal(weights.random_weights(keys[1], np.ones(5, bool)), w[1, :5])
    many = weights.random_weights(jax.random.key(0), np.ones(4000, bool))
    np.testing.assert_allclose([many.mean(), many.std()], [1.0, 0.6 / np.sqrt(12)], atol=0.02)


def test_padding_of_importance_weights_may_be_anything() -> None:
    positive = np.array([-1.0, np.nan, -np.inf])
    w = weights.importance_weights(positive, np.array([-1.5, 0.0, -np.inf]), mask=np.array([True, False, False]))
    np.testing.assert_allclose(w, [np.exp(0.5), 0, 0], rtol=1e-6)


def test_diagnostics() -> None:
    positive, negative = np.array([[-1.0, -2, 0, np.nan]]), np.array([[-1.25, -1, -3, np.nan]])
    mask = np.array([[True, True, True, False]])
    w = weights.importance_weights(positive, negative, mask=mask)
    found = {
        k: (float(s), float(n)) for k, (s, n) in weights.weight_diagnostics(positive, negative, w, mask=mask).items()
    }
    expected = np.exp([0.25, -0.5, 1.5])
    assert {k: n for k, (_, n) in found.items()} == dict.fromkeys(found, 3.0)
    sums = {k: s for k, (s, _) in found.items()}
    assert sums == pytest.approx(
        {
            "clipped_low": 1,
            "clipped_high": 1,
            "log_ratio": 0.25 - 1 + 3,
            "log_ratio_square": 0.0625 + 1 + 9,
            "weight": expected.sum(),
            "weight_square": (expected**2).sum(),
        }
    )


# ------------------------------------------------------------------------------------------------ importance sampling


def distributions(seed: int, size: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pi+, pi- and a function of the token, on a token space that can be enumerated."""
    rng = np.random.RandomState(seed)
    positive, negative = rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size))
    return positive, negative, rng.standard_normal(size)


@pytest.mark.parametrize("seed", range(3))
def test_unclipped_weights_move_expectations_between_the_contrastive_models(seed: int) -> None:
    """E_D[w f] = E_D*[f]: from pi- to pi+ with mu = 1, and from pi+ to pi- with mu = -1."""
    positive, negative, f = distributions(seed)
    with jax.enable_x64(True):
        for mu, data, target in ((1.0, negative, positive), (-1.0, positive, negative)):
            w = weights.importance_weights(np.log(positive), np.log(negative), mu=mu, lower=-np.inf, upper=np.inf)
            np.testing.assert_allclose(data @ w, 1, rtol=1e-12)
            np.testing.assert_allclose(data @ (w * f), target @ f, rtol=1e-12)


@pytest.mark.parametrize("mu", [1.0, -1.0])
def test_with_the_clip_k_makes_the_target_a_distribution(mu: float) -> None:
    positive, negative, f = distributions(5)
    data = np.random.RandomState(6).dirichlet(np.ones(7))  # any D at all
    with jax.enable_x64(True):
        raw = weights.importance_weights(np.log(positive), np.log(negative), mu=mu)
        assert abs(data @ raw - 1) > 1e-3  # by themselves the weights do not normalise
        w = weights.importance_weights(np.log(positive), np.log(negative), mu=mu, k=1 / (data @ raw))
        target = data * np.exp(mu * np.clip(np.log(positive) - np.log(negative), -0.5, 1.5))
        target /= target.sum()
        np.testing.assert_allclose(data @ w, 1, rtol=1e-12)
        np.testing.assert_allclose(data @ (w * f), target @ f, rtol=1e-12)
