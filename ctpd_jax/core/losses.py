"""Preference losses: the table of link functions, CTPD over spans, TIS-DPO and DPO as its special cases, and SFT.

Letters: B pairs, S spans of a response (Sw of the chosen one, Sl of the rejected one), N responses of a batch.

Every loss is a link function of a margin of two returns, and a return is linear in the policy's log-probabilities:

    r(x, y) = sum_i w_i (log pi_theta(p_i) - log pi_ref(p_i))          span form: span_return, for ctpd_loss
            = sum_t a_span(t) log pi_theta(y_t) - c(y)                 token form: response_returns, for training

with a and c from `reward_coefficients`. Both agree in value and gradient for every option. The second needs one number
for each student token and one for each response, which are frozen: so the teacher stays out of the training job.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real, Shaped

from ctpd_jax.core.arrays import (
    Scalar,
    SumAndCount,
    at_least_float32,
    mask_or_all,
    masked_sum_and_count,
    weighted,
)
from ctpd_jax.core.projection import response_sums

PerPair = Real[ArrayLike, "*B"]
Chosen = Real[ArrayLike, "*#B Sw"]  # the two responses of a pair differ in length
Rejected = Real[ArrayLike, "*#B Sl"]
PerSpan = Real[ArrayLike, "*#B S"]
SpanLogprob = Literal["sum", "mean"]
Normalize = Literal["none", "span", "byte"]


# ------------------------------------------------------------------------------------------------ link functions


def sigmoid_link(margin: Float[Array, "*B"], beta: Scalar, label_smoothing: Scalar = 0.0) -> Float[Array, "*B"]:
    """-(1 - e) log s(beta h) - e log s(-beta h): DPO (arXiv 2305.18290, eq. 7), with e = label_smoothing > 0 cDPO."""
    # e is the probability that the label is wrong. With e > 0 the loss is least at a finite margin.
    logit = beta * margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)


def ipo_link(margin: Float[Array, "*B"], beta: Scalar) -> Float[Array, "*B"]:
    """(h - 1 / (2 beta))^2: IPO (arXiv 2310.12036, eq. 17), a regression of the margin onto a finite target."""
    return jnp.square(margin - 1 / (2 * beta))


def hinge_link(margin: Float[Array, "*B"], beta: Scalar) -> Float[Array, "*B"]:
    """max(0, 1 - beta h): SLiC's calibration (arXiv 2305.10425); pairs beyond the margin 1 / beta are left alone."""
    return jax.nn.relu(1 - beta * margin)


def robust_link(margin: Float[Array, "*B"], beta: Scalar, label_smoothing: Scalar = 0.0) -> Float[Array, "*B"]:
    """(-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e): robust DPO (arXiv 2403.00409), unbiased if a share e of
    the labels is wrong."""
    right, wrong = -jax.nn.log_sigmoid(beta * margin), -jax.nn.log_sigmoid(-beta * margin)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def dpop_link(
    margin: Float[Array, "*B"], chosen: Float[Array, "*B"], beta: Scalar, penalty: Scalar = 50.0
) -> Float[Array, "*B"]:
    """-log s(beta (h - penalty max(0, -r_w))): DPO-Positive (arXiv 2402.13228, eq. 3); the chosen stays as likely."""
    return -jax.nn.log_sigmoid(beta * (margin - penalty * jax.nn.relu(-chosen)))


def apo_link(chosen: Float[Array, "*B"], rejected: Float[Array, "*B"], beta: Scalar) -> Float[Array, "*B"]:
    """1 - s(beta r_w) + s(beta r_l): APO-zero (arXiv 2408.06266), each response pulled its own way."""
    return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)


# A new loss is a function above and an entry here, whose key config.STAGE.loss then takes. It names as parameters what
# it needs of margin, chosen, rejected (the two returns), beta and label_smoothing.
LOSSES: dict[str, Callable[..., Array]] = {
    "sigmoid": sigmoid_link,
    "ipo": ipo_link,
    "hinge": hinge_link,
    "robust": robust_link,
    "dpop": dpop_link,
    "apo": apo_link,
}


def smooths(loss: str) -> bool:
    """Whether a loss of the table takes label smoothing."""
    return "label_smoothing" in inspect.signature(LOSSES[loss]).parameters


# ------------------------------------------------------------------------------------------------ losses of pairs


class LossOutput(NamedTuple):
    """One number for each pair, float32 [B]."""

    loss: Array
    chosen_rewards: Array  # beta * r(x, y_w)
    rejected_rewards: Array  # beta * r(x, y_l)
    lam: Array  # sigmoid(rejected - chosen): how strongly the sigmoid loss pulls on this pair


def preference_loss(
    chosen_return: PerPair,
    rejected_return: PerPair,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    loss: str = "sigmoid",
) -> LossOutput:
    """Apply a link function to the margin h = r(x, y_w) - r(x, y_l). This is what every training step calls.

    Args:
        chosen_return, rejected_return: [B], r of the two responses, not yet times beta.
        beta: > 0, the strength of the KL term; rewards are beta * r.
        label_smoothing: 0 <= e < 0.5, for link functions that take it; or [B], one in [0, 1] for each pair.
        loss: a key of LOSSES.

    Raises:
        ValueError: an unknown name, or numbers out of range (as far as they are known while tracing).

    >>> out = preference_loss(jnp.array([20.0]), jnp.array([10.0]), beta=0.1)
    >>> [round(float(part[0]), 4) for part in out]  # -log s(1), the two rewards, s(-1)
    [0.3133, 2.0, 1.0, 0.2689]
    """
    # 1. The options. A number may be traced, and is then taken as it comes.
    _check_choice("loss", loss, tuple(LOSSES))
    link = LOSSES[loss]
    if isinstance(beta, int | float) and not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    if isinstance(label_smoothing, int | float):
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}.")
        if label_smoothing and not smooths(loss):
            taken = ", ".join(filter(smooths, LOSSES))
            raise ValueError(f"label_smoothing is defined for {taken}, not for {loss!r}.")

    # 2. The margin, in float32: it is a small difference of sums of hundreds of nats.
    chosen, rejected = at_least_float32(chosen_return), at_least_float32(rejected_return)
    margin = chosen - rejected
    # A link names what it takes.
    given = {"margin": margin, "chosen": chosen, "rejected": rejected, "beta": beta, "label_smoothing": label_smoothing}
    value = link(**{name: given[name] for name in inspect.signature(link).parameters if name in given})
    return LossOutput(value, beta * chosen, beta * rejected, jax.nn.sigmoid(-(beta * margin)))


def ctpd_loss(
    policy_chosen: Chosen,
    policy_rejected: Rejected,
    reference_chosen: Chosen,
    reference_rejected: Rejected,
    weights_chosen: Chosen,
    weights_rejected: Rejected,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    loss: str = "sigmoid",
) -> LossOutput:
    """CTPD in its span form (arXiv 2601.11865): preference_loss of r = sum_i w_i (policy_i - reference_i).

    Args:
        policy_chosen, policy_rejected: log pi_theta(p_i), `span_sums` of the student's token log-probabilities (or
            `span_means`, then of the reference too, each over its own tokens).
        reference_chosen, reference_rejected: log pi_ref(p_i), the teacher's over the same spans; zeros for none.
        weights_chosen, weights_rejected: 0 in padding, where the other arrays do not matter, NaN included. For a
            normalised reward divide them by `reward_normalizer`. No gradient reaches a weight that is exactly 0.
        beta, label_smoothing, loss: as in `preference_loss`, and so are the errors.

    >>> policy, reference, weights = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.0]]), jnp.array([[3.0, 1.0]])
    >>> ctpd_loss(policy, policy, reference, policy, weights, weights, beta=1.0).chosen_rewards
    Array([3.], dtype=float32)
    """
    chosen = span_return(policy_chosen, reference_chosen, weights_chosen)
    rejected = span_return(policy_rejected, reference_rejected, weights_rejected)
    return preference_loss(chosen, rejected, beta, label_smoothing, loss)


def tis_dpo_loss(
    policy_chosen: Chosen,
    policy_rejected: Rejected,
    reference_chosen: Chosen,
    reference_rejected: Rejected,
    weights_chosen: Chosen,
    weights_rejected: Rejected,
    mask_chosen: Shaped[ArrayLike, "*#B Sw"] | None = None,
    mask_rejected: Shaped[ArrayLike, "*#B Sl"] | None = None,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> LossOutput:
    """TIS-DPO (arXiv 2410.04350) without its optional KL term: `ctpd_loss` with every token a span.

    All arrays [B, T]: token log-probabilities of policy and reference (the student's start), token weights, and masks,
    True for the response's tokens. Without a mask, tokens of weight 0 are the padding.
    """
    # A weight of 0 is what padding is to ctpd_loss.
    w_chosen, w_rejected = at_least_float32(weights_chosen), at_least_float32(weights_rejected)
    w_chosen = jnp.where(mask_or_all(mask_chosen, w_chosen.shape), w_chosen, 0)
    w_rejected = jnp.where(mask_or_all(mask_rejected, w_rejected.shape), w_rejected, 0)
    logps = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return ctpd_loss(*logps, w_chosen, w_rejected, beta, label_smoothing)


def dpo_loss(
    policy_chosen: PerPair,
    policy_rejected: PerPair,
    reference_chosen: PerPair,
    reference_rejected: PerPair,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    loss: str = "sigmoid",
) -> LossOutput:
    """DPO (arXiv 2305.18290) and, by `loss`, IPO and hinge: `ctpd_loss` with every response one span of weight 1.

    All arrays [B]: log-probabilities of whole responses, the sum over their tokens including the end of turn.
    """
    chosen = at_least_float32(policy_chosen) - at_least_float32(reference_chosen)
    rejected = at_least_float32(policy_rejected) - at_least_float32(reference_rejected)
    return preference_loss(chosen, rejected, beta, label_smoothing, loss)


def sft_loss(token_logps: Real[ArrayLike, "*slots"], mask: Shaped[ArrayLike, "*slots"]) -> SumAndCount:
    """Negative log-likelihood as (sum, count), of the tokens where the mask is true; others may even be NaN."""
    total, count = masked_sum_and_count(token_logps, jnp.asarray(mask, bool))
    return -total, count


def sft_term(response_logps: PerPair, token_counts: PerPair) -> Float[Array, "*B"]:
    """Mean negative log-likelihood per token of each chosen response, to be added to its pair's loss times a weight.

    The "+ NLL" of iterative RPO (arXiv 2404.19733). Counts of 0 are the padding of a batch.
    """
    # It keeps the chosen response likely where a preference loss alone is content with a larger margin.
    return -at_least_float32(response_logps) / jnp.maximum(at_least_float32(token_counts), 1)


# ------------------------------------------------------------------------------------------------ returns


def span_return(policy: PerSpan, reference: PerSpan, weights: PerSpan) -> Float[Array, "*B"]:
    """r = sum_i w_i (policy_i - reference_i), the span form. Entries of weight 0 do not matter, NaN included."""
    return weighted(at_least_float32(policy) - at_least_float32(reference), weights).sum(axis=-1)


def response_returns(
    token_logps: Real[ArrayLike, "*slots"],
    token_weights: Real[ArrayLike, "*slots"],
    response_ids: Int[ArrayLike, "*slots"],
    constants: Real[ArrayLike, "*N"],
) -> Float[Array, "*N"]:
    """r_n = sum_{t: id(t) = n} a_t log pi_theta(y_t) - c_n, the token form, of all the responses of a batch.

    Args:
        token_logps: any shape: rows may hold one response or several.
        token_weights: `project_to_tokens` of the coefficients; tokens of weight 0 do not matter, NaN included.
        response_ids: int, the place of the token's response among `constants`, flattened; -1 in padding.
        constants: c of each response; its shape, such as [B, 2], is the result's.

    >>> logps, weights, ids = jnp.array([-1.0, -2.0, -3.0]), jnp.array([1.0, 2.0, 1.0]), jnp.array([0, 0, 1])
    >>> response_returns(logps, weights, ids, jnp.array([[-4.0, -4.0]]))
    Array([[-1.,  1.]], dtype=float32)
    """
    # Every token is multiplied once and added once: this is all that the weights are to training. A token of weight 0
    # loses its response rather than its value: a select behind the product would keep XLA from fusing it into the sum.
    c, weights = at_least_float32(constants), at_least_float32(token_weights)
    ids = jnp.where(weights != 0, jnp.asarray(response_ids), -1)
    return response_sums(at_least_float32(token_logps) * weights, ids, c.size).reshape(c.shape) - c


def reward_coefficients(
    weights: PerSpan,
    student_counts: PerSpan,
    reference: PerSpan | None = None,
    reference_counts: PerSpan | None = None,
    byte_lengths: PerSpan | None = None,
    span_logprob: SpanLogprob = "sum",
    normalize: Normalize = "none",
) -> tuple[Float[Array, "*B S"], Float[Array, "*B"]]:
    """The a_i and c that turn every option of the reward into r = sum_t a_span(t) log pi_theta(y_t) - c.

        a_i = w_i / (Z n_i),   c = sum_i w_i ref_i / (Z m_i)

    with Z from `reward_normalizer`. For "mean", n_i and m_i are the numbers of the policy's and of the reference's
    tokens in span i; for "sum" both are 1.

    Args:
        weights: 0 in padding.
        student_counts: the student's tokens in each span (`span_counts`), 0 in padding.
        reference: the reference's log-probability of each span, **summed** over its tokens; None for no reference
            (c = 0). The teacher, or the student's start; a reward relative to the student's start is the same thing as
            the start for reference, because the other reference cancels from it.
        reference_counts: the reference's tokens in each span; needed for "mean" with a reference.
        byte_lengths: bytes in each span (0 for an end of turn); needed for normalize="byte".
        span_logprob: "sum", or "mean" over the span's own tokens.
        normalize: "none", "span" or "byte": see `reward_normalizer`.

    Raises:
        ValueError: an unknown option, or an option without the counts that it needs.

    >>> a, c = reward_coefficients(jnp.array([3.0, 1.0]), jnp.array([2, 1]), jnp.array([-2.0, -5.0]))
    >>> a.tolist(), float(c)
    ([3.0, 1.0], -11.0)
    """
    _check_choice("span_logprob", span_logprob, get_args(SpanLogprob))
    # 1. The policy's side: what one of its tokens counts for.
    counts = at_least_float32(student_counts)
    scaled = at_least_float32(weights) / reward_normalizer(counts, byte_lengths, normalize)
    coefficients = scaled / jnp.maximum(counts, 1) if span_logprob == "mean" else scaled
    coefficients = jnp.where(counts > 0, coefficients, 0)
    if reference is None:
        return coefficients, jnp.zeros(coefficients.shape[:-1], coefficients.dtype)
    # 2. The reference's side: it is frozen, so its share of the return is one number.
    share = scaled
    if span_logprob == "mean":
        if reference_counts is None:
            raise ValueError('span_logprob="mean" needs reference_counts, the reference\'s tokens in each span.')
        share = scaled / jnp.maximum(at_least_float32(reference_counts), 1)
    return coefficients, weighted(reference, jnp.where(counts > 0, share, 0)).sum(axis=-1)


def reward_normalizer(
    student_counts: PerSpan, byte_lengths: PerSpan | None = None, normalize: Normalize = "none"
) -> Float[Array, "*B 1"]:
    """Z of a response, at least 1: 1 ("none"), its number of spans ("span") or its number of bytes ("byte").

    Rewards shrink by Z, so beta must grow by about as much. Counts of 0 mark padding spans, whose bytes do not matter.
    """
    _check_choice("normalize", normalize, get_args(Normalize))
    real = jnp.asarray(student_counts) > 0
    if normalize == "none":
        return jnp.ones((*real.shape[:-1], 1), jnp.float32)
    if normalize == "span":
        size = real.astype(jnp.float32)
    elif byte_lengths is None:
        raise ValueError('normalize="byte" needs byte_lengths, the bytes in each span.')
    else:
        size = jnp.where(real, at_least_float32(byte_lengths), 0)
    return jnp.maximum(size.sum(axis=-1, keepdims=True), 1)


# ------------------------------------------------------------------------------------------------ what to log


def reward_metrics(prefix: str, chosen: Array, rejected: Array) -> dict[str, Array]:
    """What is logged of the rewards of pairs. Ties count one half: a policy that has learnt nothing is at 50 %."""
    margin = chosen - rejected
    return {
        f"{prefix}chosen": chosen,
        f"{prefix}rejected": rejected,
        f"{prefix}margins": margin,
        f"{prefix}accuracies": (margin > 0) + 0.5 * (margin == 0),
    }


def lambda_diagnostics(lam: PerPair, mask: Shaped[ArrayLike, "*B"] | None = None) -> dict[str, SumAndCount]:
    """How the anchor selects pairs: the `mean` of lambda, how many are `below_low`, 0.05, and `above_high`, 0.95.

    lambda = sigmoid(beta (r_l - r_w)), LossOutput's `lam`, is the weight with which a pair enters the gradient. Near 0
    the pair is ignored, near 1 it is pulled as hard as possible; where the reference is another model, much of that is
    how differently the two rate the text as language, rather than preference. `mask` says which pairs count.
    """
    values = at_least_float32(lam)
    real = mask_or_all(mask, values.shape)
    return {
        "mean": masked_sum_and_count(values, real),
        "below_low": masked_sum_and_count(values < 0.05, real),
        "above_high": masked_sum_and_count(values > 0.95, real),
    }


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
