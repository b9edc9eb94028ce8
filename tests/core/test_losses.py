"""CTPD's special cases, its gradient formula, and what must hold for every loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.core import losses
from ctpd_jax.core.logprobs import token_logprobs
from ctpd_jax.core.projection import project_to_tokens, span_counts, span_sums
from ctpd_jax.core.weights import importance_weights

PAIRS, TOKENS, WIDTH, VOCABULARY, BETA = 5, 12, 6, 31, 0.3
VALUES, GRADIENTS = {"rtol": 1e-6}, {"rtol": 1e-5, "atol": 1e-9}
LENGTHS = {"chosen": np.array([12, 7, 1, 9, 4]), "rejected": np.array([5, 12, 3, 9, 11])}  # the end of turn included


class Model:
    """A student of one matrix, scored on fixed hidden states: enough for values and gradients of real log-probs."""

    def __init__(self, seed: int) -> None:
        rng = np.random.RandomState(seed)
        self.hidden = {side: rng.standard_normal((PAIRS, TOKENS, WIDTH)) for side in LENGTHS}
        self.targets = {side: rng.randint(0, VOCABULARY, size=(PAIRS, TOKENS)) for side in LENGTHS}
        self.start, self.now, self.positive, self.negative = (
            jnp.asarray(0.5 * rng.standard_normal((VOCABULARY, WIDTH))) for _ in range(4)
        )
        self.mask = {side: np.arange(TOKENS) < n[:, None] for side, n in LENGTHS.items()}

    def logps(self, parameters: jax.Array, side: str) -> jax.Array:
        return token_logprobs(self.hidden[side], parameters, self.targets[side], chunk=16)

    def plain_logps(self, parameters: jax.Array, side: str) -> jax.Array:
        logits = jnp.einsum("btd,vd->btv", self.hidden[side], parameters, precision="highest")
        return jnp.take_along_axis(jax.nn.log_softmax(logits), self.targets[side][..., None], axis=-1)[..., 0]


def same_values_and_gradients(ours: Callable, theirs: Callable, parameters: jax.Array) -> None:
    """1e-6 for values and 1e-5 for gradients, relative: in float64, because a loss near 0 is the small difference of
    sums near 30, of which float32 keeps six digits."""

    def evaluate(function: Callable) -> tuple[jax.Array, jax.Array]:
        def total(p: jax.Array) -> tuple[jax.Array, jax.Array]:
            loss = function(p)
            return loss.sum(), loss

        gradient, loss = jax.jit(jax.grad(total, has_aux=True))(parameters)
        assert loss.dtype == gradient.dtype == jnp.float64
        return loss, gradient

    for found, expected, tolerance in zip(evaluate(ours), evaluate(theirs), (VALUES, GRADIENTS)):
        np.testing.assert_allclose(found, expected, **tolerance)


def returns_of_rows(token_logps: jax.Array, token_weights: jax.Array, constants: np.ndarray) -> jax.Array:
    """response_returns of [B, T], one response a row."""
    rows = np.broadcast_to(np.arange(len(token_logps))[:, None], token_logps.shape)
    return losses.response_returns(token_logps, token_weights, rows, constants)


@pytest.fixture
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


# ------------------------------------------------------------------------------------------------ special cases


@pytest.mark.parametrize("loss", ["sigmoid", "cdpo", "ipo", "hinge"])
def test_one_tokenizer_without_weights_is_dpo(loss: str, double: None) -> None:
    """w = 1, the student's start for reference, the end of turn in: against DPO written out here."""
    model = Model(0)
    smoothing, link = (0.1, "sigmoid") if loss == "cdpo" else (0.0, loss)

    def ctpd(parameters: jax.Array) -> jax.Array:
        arguments = []
        for p in (parameters, model.start):
            for side in LENGTHS:
                ids = np.where(model.mask[side], np.arange(TOKENS) // 2, -1)  # any cut into spans will do
                arguments.append(span_sums(model.logps(p, side), ids, TOKENS))
        ones = [1.0 * (np.arange(TOKENS) < (n[:, None] + 1) // 2) for n in LENGTHS.values()]
        return losses.ctpd_loss(*arguments, *ones, BETA, smoothing, link).loss

    def dpo(parameters: jax.Array) -> jax.Array:
        logps = {
            (side, name): (model.plain_logps(p, side) * model.mask[side]).sum(axis=1)
            for side in LENGTHS
            for name, p in (("now", parameters), ("start", model.start))
        }
        h = logps["chosen", "now"] - logps["chosen", "start"] - logps["rejected", "now"] + logps["rejected", "start"]
        return {
            "sigmoid": -jax.nn.log_sigmoid(BETA * h),
            "cdpo": -0.9 * jax.nn.log_sigmoid(BETA * h) - 0.1 * jax.nn.log_sigmoid(-BETA * h),
            "ipo": (h - 1 / (2 * BETA)) ** 2,
            "hinge": jnp.maximum(0, 1 - BETA * h),
        }[loss]

    def library_dpo(parameters: jax.Array) -> jax.Array:
        sums = [
            jnp.where(model.mask[side], model.logps(p, side), 0).sum(axis=1)
            for p in (parameters, model.start)
            for side in LENGTHS
        ]
        return losses.dpo_loss(*sums, BETA, smoothing, link).loss

    same_values_and_gradients(ctpd, dpo, model.now)
    same_values_and_gradients(library_dpo, dpo, model.now)


def test_one_tokenizer_with_token_weights_is_tis_dpo(double: None) -> None:
    """Every token a span, weights per token, the student's start for reference: against TIS-DPO written out here."""
    model = Model(1)
    weights = {
        side: importance_weights(model.logps(model.positive, side), model.logps(model.negative, side), mu=mu)
        for side, mu in (("chosen", 1.0), ("rejected", -1.0))
    }

    def ctpd(parameters: jax.Array) -> jax.Array:
        ids = {side: np.where(mask, np.arange(TOKENS), -1) for side, mask in model.mask.items()}
        sums = [
            span_sums(model.logps(p, side), ids[side], TOKENS) for p in (parameters, model.start) for side in LENGTHS
        ]
        return losses.ctpd_loss(*sums, *(weights[side] * model.mask[side] for side in LENGTHS), BETA).loss

    def tis_dpo(parameters: jax.Array) -> jax.Array:
        margin = 0.0
        for side, sign, mu in (("chosen", 1, 1), ("rejected", -1, -1)):
            ratio = model.plain_logps(model.positive, side) - model.plain_logps(model.negative, side)
            w = jnp.exp(mu * jnp.clip(ratio, -0.5, 1.5)) * model.mask[side]
            gain = model.plain_logps(parameters, side) - model.plain_logps(model.start, side)
            margin = margin + sign * (w * gain).sum(axis=1)
        return -jnp.log(jax.nn.sigmoid(BETA * margin))

    def library_tis_dpo(parameters: jax.Array) -> jax.Array:
        logps = [model.logps(p, side) for p in (parameters, model.start) for side in LENGTHS]
        masks = [model.mask[side] for side in LENGTHS]
        return losses.tis_dpo_loss(*logps, *(weights[side] for side in LENGTHS), *masks, beta=BETA).loss

    same_values_and_gradients(ctpd, tis_dpo, model.now)
    same_values_and_gradients(library_tis_dpo, tis_dpo, model.now)


def test_the_gradient_is_the_formula(double: None) -> None:
    """dL = -beta lambda (sum_t w_t d log pi(y_w,t) - sum_t w_t d log pi(y_l,t)), lambda = sigmoid(beta (r_l - r_w))."""
    model = Model(2)
    rng = np.random.RandomState(3)
    weights = {side: rng.uniform(0.2, 4.5, (PAIRS, TOKENS)) * model.mask[side] for side in LENGTHS}
    constants = {side: rng.uniform(-60, -20, PAIRS) for side in LENGTHS}  # the share of any reference at all

    def out(parameters: jax.Array) -> losses.LossOutput:
        returns = [returns_of_rows(model.logps(parameters, s), weights[s], constants[s]) for s in LENGTHS]
        return losses.preference_loss(*returns, BETA)

    found = jax.jit(jax.grad(lambda p: out(p).loss.sum()))(model.now)
    now = out(model.now)
    lam = 1 / (1 + np.exp(now.chosen_rewards - now.rejected_rewards))
    np.testing.assert_allclose(now.lam, lam, **VALUES)
    expected = 0.0
    for side, sign in (("chosen", 1), ("rejected", -1)):
        pull = -BETA * sign * lam[:, None] * weights[side]
        expected = expected + jax.vjp(lambda p, s=side: model.plain_logps(p, s), model.now)[1](pull)[0]
    np.testing.assert_allclose(found, expected, **GRADIENTS)


def test_the_reference_acts_through_lambda_alone(double: None) -> None:
    """Another reference multiplies the gradient of a pair by one number: the ratio of the two lambdas."""
    rng = np.random.RandomState(4)
    policy, w = jnp.asarray(rng.uniform(-4, 0, (2, 1, 6))), rng.uniform(0.2, 4.5, (2, 1, 6))

    def pull(reference: np.ndarray) -> tuple[jax.Array, jax.Array]:
        def total(p: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = losses.ctpd_loss(*p, *reference, *w, BETA)
            return out.loss.sum(), out.lam

        return jax.grad(total, has_aux=True)(policy)

    (one, lam_one), (other, lam_other) = pull(rng.uniform(-4, 0, (2, 1, 6))), pull(rng.uniform(-4, 0, (2, 1, 6)))
    np.testing.assert_allclose(one / lam_one, other / lam_other, rtol=1e-5)


def test_relative_to_the_start_is_the_start_for_reference() -> None:
    """The teacher cancels from r(theta) - r(start), as the docstring of reward_coefficients says."""
    rng = np.random.RandomState(5)
    ids = np.array([[0, 0, 1, 2, 2, -1]])
    now, start, w = rng.uniform(-3, 0, (1, 6)), rng.uniform(-3, 0, (1, 6)), rng.uniform(0.5, 2, (1, 3))
    counts = span_counts(ids, 3)
    a, c_teacher = losses.reward_coefficients(w, counts, rng.uniform(-3, 0, (1, 3)))
    _, c_start = losses.reward_coefficients(w, counts, span_sums(start, ids, 3))
    a = project_to_tokens(a, ids)
    relative = returns_of_rows(now, a, c_teacher) - returns_of_rows(start, a, c_teacher)
    np.testing.assert_allclose(relative, returns_of_rows(now, a, c_start), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ every loss


def random_spans(seed: int, spans: int = 6) -> tuple[list[jax.Array], np.ndarray]:
    rng = np.random.RandomState(seed)
    arrays = [jnp.asarray(rng.uniform(-3, 0, (4, spans)), jnp.float32) for _ in range(4)]
    return arrays, rng.uniform(0.2, 4.5, (2, 4, spans)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), loss=st.sampled_from(["sigmoid", "ipo", "hinge"]))
def test_a_pair_of_equal_returns_and_a_swapped_pair(seed: int, loss: str) -> None:
    (pc, pr, rc, rr), (wc, wr) = random_spans(seed)
    out = losses.ctpd_loss(pc, pr, rc, rr, wc, wr, BETA, loss=loss)
    swapped = losses.ctpd_loss(pr, pc, rr, rc, wr, wc, BETA, loss=loss)
    np.testing.assert_array_equal(out.chosen_rewards, swapped.rejected_rewards)
    np.testing.assert_allclose(out.lam + swapped.lam, 1, rtol=1e-6)
    equal = losses.ctpd_loss(pc, pc, rc, rc, wc, wc, BETA, loss=loss)
    neutral = {"sigmoid": np.log(2), "ipo": 1 / (4 * BETA**2), "hinge": 1.0}[loss]
    np.testing.assert_allclose(equal.loss, neutral, rtol=1e-6)
    np.testing.assert_allclose(equal.lam, 0.5, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_padding_may_hold_anything(seed: int) -> None:
    """NaN and infinities where the weight is 0 change neither value nor gradient."""
    arrays, (wc, wr) = random_spans(seed)
    wc[:, 4:], wr[:, 2:] = 0, 0

    def value_and_gradients(fill: float) -> tuple[jax.Array, list[jax.Array]]:
        filled = [a.at[:, start:].set(fill) for a, start in zip(arrays, (4, 2, 4, 2))]
        return jax.value_and_grad(lambda a: losses.ctpd_loss(*a, wc, wr, BETA).loss.sum())(filled)

    clean = value_and_gradients(0.0)
    for fill in (np.nan, -np.inf):
        jax.tree.map(np.testing.assert_array_equal, value_and_gradients(fill), clean)


def test_extreme_margins_stay_finite() -> None:
    out = losses.preference_loss(np.array([1e4, -1e4]), np.array([-1e4, 1e4]), 1.0, 0.1)
    np.testing.assert_allclose(out.loss, [0.1 * 2e4, 0.9 * 2e4], rtol=1e-6)
    gradient = jax.grad(lambda c: losses.preference_loss(c, jnp.zeros(2), 1.0).loss.sum())(jnp.array([1e4, -1e4]))
    np.testing.assert_array_equal(gradient, [0, -1])


def test_responses_of_different_numbers_of_spans() -> None:
    out = losses.ctpd_loss(
        np.zeros((1, 3)), np.zeros((1, 5)), -np.ones((1, 3)), -np.ones((1, 5)), np.ones((1, 3)), np.ones((1, 5))
    )
    np.testing.assert_allclose([out.chosen_rewards[0], out.rejected_rewards[0]], [0.3, 0.5], rtol=1e-6)


def test_bfloat16_log_probs_are_added_in_float32() -> None:
    ones = jnp.ones((1, 1000), jnp.bfloat16)
    assert returns_of_rows(ones, ones, np.zeros(1, np.float32)) == 1000


def test_sft_loss_is_a_sum_and_a_count() -> None:
    total, count = losses.sft_loss(np.array([[-1.0, -2.0, np.nan], [-4.0, 7.0, 7.0]]), np.array([[1, 1, 0], [1, 0, 0]]))
    assert (float(total), float(count)) == (7.0, 3.0)
    gradient = jax.grad(lambda x: losses.sft_loss(x, jnp.array([1, 0]))[0])(jnp.array([-1.0, jnp.nan]))
    np.testing.assert_array_equal(gradient, [-1, 0])


def test_sft_term_is_per_token_of_the_pair() -> None:
    out = losses.preference_loss(jnp.zeros(2), jnp.zeros(2))
    with_term = out.loss + 0.5 * losses.sft_term(np.array([-4.0, -4.0]), np.array([2, 1]))
    np.testing.assert_allclose(with_term - out.loss, [0.5 * 2, 0.5 * 4], rtol=1e-6)
    assert losses.sft_term(np.zeros(1), np.zeros(1)) == 0  # padding of a batch


def test_lambda_diagnostics_add_up_over_batches() -> None:
    lam = np.array([0.01, 0.5, 0.99, 0.96, 0.2, 0.0])
    mask = np.array([1, 1, 1, 1, 1, 0])
    found = losses.lambda_diagnostics(lam, mask)
    assert {name: (round(float(s), 5), float(n)) for name, (s, n) in found.items()} == {
        "mean": (2.66, 5),
        "below_low": (1, 5),
        "above_high": (2, 5),
    }
    halves = [losses.lambda_diagnostics(lam[i : i + 3], mask[i : i + 3]) for i in (0, 3)]
    jax.tree.map(lambda whole, a, b: np.testing.assert_allclose(whole, a + b, rtol=1e-6), found, *halves)


def test_a_loss_is_one_function_and_one_line_of_the_table(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """A new link function gets every caller's arguments, and label smoothing where its signature has it."""

    def squared_hinge(margin: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
        return (1 - label_smoothing) * jnp.square(jax.nn.relu(1 - beta * margin))

    monkeypatch.setitem(losses.LOSSES, "squared_hinge", squared_hinge)
    out = losses.preference_loss(jnp.ones(1), jnp.zeros(1), 0.5, 0.25, loss="squared_hinge")
    np.testing.assert_allclose(out.loss, 0.75 * 0.25)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z: losses.preference_loss(z, z, loss="log"), "'sigmoid', 'ipo', 'hinge'.*, got 'log'"),
        (lambda z: losses.preference_loss(z, z, beta=0.0), "beta must be positive"),
        (lambda z: losses.preference_loss(z, z, label_smoothing=0.5), "label_smoothing must lie in"),
        (lambda z: losses.preference_loss(z, z, label_smoothing=0.1, loss="ipo"), "not for 'ipo'"),
        (lambda z: losses.reward_coefficients(z, z, span_logprob="max"), "span_logprob must be one of"),
        (lambda z: losses.reward_coefficients(z, z, normalize="token"), "normalize must be one of"),
        (lambda z: losses.reward_coefficients(z, z, normalize="byte"), "needs byte_lengths"),
        (lambda z: losses.reward_coefficients(z, z, z, span_logprob="mean"), "needs reference_counts"),
    ],
)
def test_options_that_do_not_exist_are_refused_by_name(call: Callable, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(3))
