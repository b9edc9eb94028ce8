"""Preference losses: the link functions, CTPD over spans, TIS-DPO and DPO as its special cases, and SFT.

Letters: B pairs, T tokens of a response, S spans of a response, ... any leading axes.

Every loss is a link function of the margin of two returns, and a return is linear in the policy's log-probabilities:

    r(x, y) = sum_i w_i (log pi_theta(p_i) - log pi_ref(p_i)) = sum_t a_span(t) log pi_theta(y_t) - c(y)

The span form is `ctpd_loss`; the token form is `response_return` with the a and c of `reward_coefficients`. Both agree
in value and gradient for every option, and training uses the second: one number for each student token and one for each
response.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ctpd_jax.core.arrays import Scalar, at_least_float32, mask_or_all, masked_sum_and_count, weighted_sum

Link = Literal["sigmoid", "ipo", "hinge"]
SpanLogprob = Literal["sum", "mean"]
Normalize = Literal["none", "span", "byte"]


class LossOutput(NamedTuple):
    """One number for each pair, float32 [B]."""

    loss: jax.Array
    chosen_rewards: jax.Array  # beta * r(x, y_w)
    rejected_rewards: jax.Array  # beta * r(x, y_l)
    lam: jax.Array  # sigmoid(rejected - chosen): how strongly the sigmoid loss pulls on this pair


def preference_loss(
    chosen_return: ArrayLike,
    rejected_return: ArrayLike,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    loss: Link = "sigmoid",
) -> LossOutput:
    """The link functions, with h = r(x, y_w) - r(x, y_l):

    sigmoid   -(1 - e) log s(beta h) - e log s(-beta h)     DPO (arXiv 2305.18290); e = label_smoothing > 0: cDPO
    ipo       (h - 1 / (2 beta))^2                          IPO (arXiv 2310.12036)
    hinge     max(0, 1 - beta h)                            SLiC (arXiv 2305.10425)

    Args:
        chosen_return, rejected_return: float [B], r of the two responses, not yet times beta.
        beta: > 0.
        label_smoothing: the probability that the label is wrong, 0 <= e < 0.5; for the sigmoid only.
        loss: the name of the link function.

    Raises:
        ValueError: an unknown name, or numbers out of range (as far as they are known while tracing).
    """
    _check_link(beta, label_smoothing, loss)
    chosen, rejected = at_least_float32(chosen_return), at_least_float32(rejected_return)
    margin = chosen - rejected
    logit = beta * margin
    if loss == "sigmoid":
        value = -(1 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)
    elif loss == "ipo":
        value = jnp.square(margin - 1 / (2 * beta))
    else:
        value = jax.nn.relu(1 - logit)
    return LossOutput(value, beta * chosen, beta * rejected, jax.nn.sigmoid(-logit))


def ctpd_loss(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    weights_chosen: ArrayLike,
    weights_rejected: ArrayLike,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    loss: Link = "sigmoid",
) -> LossOutput:
    """CTPD in its span form (arXiv 2601.11865): preference_loss of r = sum_i w_i (policy_i - reference_i).

    Args:
        policy_chosen, policy_rejected: float [B, S], log pi_theta(p_i): `span_sums` of the student's token
            log-probabilities (or `span_means`, then of the reference too, each over its own tokens).
        reference_chosen, reference_rejected: float [B, S], log pi_ref(p_i), the teacher's over the same spans; zeros
            for no reference.
        weights_chosen, weights_rejected: float [B, S], 0 in padding, where the other arrays do not matter, NaN
            included. For a normalised reward divide them by `reward_normalizer`.
        beta, label_smoothing, loss: see `preference_loss`.

    The numbers of spans of the two responses may differ. No gradient reaches a weight that is exactly 0.
    """
    return preference_loss(
        span_return(policy_chosen, reference_chosen, weights_chosen),
        span_return(policy_rejected, reference_rejected, weights_rejected),
        beta,
        label_smoothing,
        loss,
    )


def tis_dpo_loss(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    weights_chosen: ArrayLike,
    weights_rejected: ArrayLike,
    mask_chosen: ArrayLike | None = None,
    mask_rejected: ArrayLike | None = None,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> LossOutput:
    """TIS-DPO (arXiv 2410.04350) without its optional KL term: each token is a span, the reference the student's start.

    All arrays [B, T]: token log-probabilities of policy and reference, token weights, and masks, True for the
    response's tokens; without a mask, tokens of weight 0 are the padding.
    """

    def masked(weights: ArrayLike, mask: ArrayLike | None) -> jax.Array:
        values = at_least_float32(weights)
        return jnp.where(mask_or_all(mask, values.shape), values, 0)

    return ctpd_loss(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        masked(weights_chosen, mask_chosen),
        masked(weights_rejected, mask_rejected),
        beta,
        label_smoothing,
    )


def dpo_loss(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    loss: Link = "sigmoid",
) -> LossOutput:
    """DPO (arXiv 2305.18290) and, by `loss`, IPO and hinge.

    All arrays [B]: log-probabilities of whole responses, the sum over their tokens including the end of turn.
    """
    return preference_loss(
        at_least_float32(policy_chosen) - at_least_float32(reference_chosen),
        at_least_float32(policy_rejected) - at_least_float32(reference_rejected),
        beta,
        label_smoothing,
        loss,
    )


def sft_loss(token_logps: ArrayLike, mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood as (sum, count): add over batches and hosts, divide once.

    Args:
        token_logps: float [...], any shape.
        mask: bool or 0/1 [...], True for the tokens that are trained on; others do not matter, NaN included.

    Returns:
        float32 scalars.
    """
    total, count = masked_sum_and_count(token_logps, jnp.asarray(mask, bool))
    return -total, count


def with_sft_term(output: LossOutput, chosen_logps: ArrayLike, mask: ArrayLike, weight: Scalar) -> LossOutput:
    """Add weight times the chosen response's mean negative log-likelihood per token to the loss of its pair.

    Args:
        output: a preference loss.
        chosen_logps: float [B, T], the policy's token log-probabilities of the chosen responses.
        mask: bool [B, T].
        weight: of the term, 0 for none.
    """
    sums, counts = jax.vmap(sft_loss)(chosen_logps, jnp.asarray(mask))
    return output._replace(loss=output.loss + weight * sums / jnp.maximum(counts, 1))


# ------------------------------------------------------------------------------------------------ returns


def span_return(policy: ArrayLike, reference: ArrayLike, weights: ArrayLike) -> jax.Array:
    """r = sum_i w_i (policy_i - reference_i): [..., S] each -> float32 [...]. Entries of weight 0 do not matter."""
    return weighted_sum(at_least_float32(policy) - at_least_float32(reference), weights)


def response_return(token_logps: ArrayLike, token_weights: ArrayLike, constant: ArrayLike = 0.0) -> jax.Array:
    """r = sum_t a_t log pi_theta(y_t) - c: the return in its token form.

    Args:
        token_logps: float [..., T].
        token_weights: float [..., T], `project_to_tokens` of the coefficients; tokens of weight 0 do not matter.
        constant: float [...], c(y).

    Returns:
        float32 [...].
    """
    return weighted_sum(token_logps, token_weights) - jnp.asarray(constant)


def reward_coefficients(
    weights: ArrayLike,
    student_counts: ArrayLike,
    reference: ArrayLike | None = None,
    reference_counts: ArrayLike | None = None,
    byte_lengths: ArrayLike | None = None,
    span_logprob: SpanLogprob = "sum",
    normalize: Normalize = "none",
) -> tuple[jax.Array, jax.Array]:
    """The a_i and c that turn every option of the reward into r = sum_t a_span(t) log pi_theta(y_t) - c.

        a_i = w_i / (Z n_i),   c = sum_i w_i ref_i / (Z m_i)

    with Z from `reward_normalizer`. For "mean", n_i and m_i are the numbers of the policy's and of the reference's
    tokens in span i; for "sum" both are 1.

    Args:
        weights: float [..., S], 0 in padding.
        student_counts: [..., S], the student's tokens in each span (`span_counts`), 0 in padding.
        reference: float [..., S], the reference's log-probability of each span, **summed** over its tokens; None for no
            reference (c = 0). The teacher, or the student's start; a reward relative to the student's start is the same
            thing as the start for reference, because the other reference cancels from it.
        reference_counts: [..., S], the reference's tokens in each span; needed for "mean" with a reference.
        byte_lengths: [..., S], bytes in each span (0 for an end of turn); needed for normalize="byte".
        span_logprob: "sum", or "mean" over the span's own tokens.
        normalize: "none", "span" or "byte".

    Returns:
        a, float32 [..., S], 0 in padding, and c, float32 [...].

    Raises:
        ValueError: an unknown option, or an option without the counts that it needs.
    """
    _check_choice("span_logprob", span_logprob, SpanLogprob)
    counts = at_least_float32(student_counts)
    scaled = at_least_float32(weights) / reward_normalizer(counts, byte_lengths, normalize)
    coefficients = scaled / jnp.maximum(counts, 1) if span_logprob == "mean" else scaled
    coefficients = jnp.where(counts > 0, coefficients, 0)
    if reference is None:
        return coefficients, jnp.zeros(coefficients.shape[:-1], coefficients.dtype)
    share = scaled
    if span_logprob == "mean":
        if reference_counts is None:
            raise ValueError('span_logprob="mean" needs reference_counts, the reference\'s tokens in each span.')
        share = scaled / jnp.maximum(at_least_float32(reference_counts), 1)
    return coefficients, weighted_sum(reference, jnp.where(counts > 0, share, 0))


def reward_normalizer(
    student_counts: ArrayLike, byte_lengths: ArrayLike | None = None, normalize: Normalize = "none"
) -> jax.Array:
    """Z of a response: 1 ("none"), its number of spans ("span") or its number of bytes ("byte").

    Args:
        student_counts: [..., S], 0 marks padding spans.
        byte_lengths: [..., S], bytes in each span; padding does not matter.
        normalize: the option. Rewards shrink by Z, so beta must grow by about as much.

    Returns:
        float32 [..., 1], at least 1.
    """
    _check_choice("normalize", normalize, Normalize)
    real = jnp.asarray(student_counts) > 0
    if normalize == "none":
        return jnp.ones((*real.shape[:-1], 1), jnp.float32)
    if normalize == "span":
        size = real.astype(jnp.float32)
    else:
        if byte_lengths is None:
            raise ValueError('normalize="byte" needs byte_lengths, the bytes in each span.')
        size = jnp.where(real, at_least_float32(byte_lengths), 0)
    return jnp.maximum(size.sum(axis=-1, keepdims=True), 1)


def lambda_diagnostics(
    lam: ArrayLike, mask: ArrayLike | None = None, low: float = 0.05, high: float = 0.95
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """How the anchor selects pairs, each as (sum, count): add over batches and hosts, divide once.

    lambda = sigmoid(beta (r_l - r_w)) is the weight with which a pair enters the gradient. Near 0 the pair is ignored,
    near 1 it is pulled as hard as possible; where the reference is another model, much of that is how differently the
    two rate the text as language, rather than preference.

    Args:
        lam: float [B], from LossOutput.
        mask: bool or 0/1 [B], pairs that count.

    Returns:
        `mean`, `below_low` and `above_high`, float32 scalars.
    """
    values = at_least_float32(lam)
    real = mask_or_all(mask, values.shape)
    return {
        "mean": masked_sum_and_count(values, real),
        "below_low": masked_sum_and_count(values < low, real),
        "above_high": masked_sum_and_count(values > high, real),
    }


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}.")


def _check_link(beta: Scalar, label_smoothing: Scalar, loss: str) -> None:
    _check_choice("loss", loss, Link)
    if isinstance(beta, int | float) and not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    if isinstance(label_smoothing, int | float):
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}.")
        if label_smoothing and loss != "sigmoid":
            raise ValueError(f"label_smoothing is defined for the sigmoid loss only, not for {loss!r}.")
