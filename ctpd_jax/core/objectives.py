"""Objectives beyond the paper's: what the teacher knows enters as a target for each span, or as one number for a pair.

Letters: B pairs, N responses, S spans of a response, K slots of a row.

In the paper's loss the teacher is the reference, so a margin also holds how differently two models rate the text as
language. Here every quantity is a ratio of two models with *one* tokenizer: log pi+ - log pi_ref on the teacher's side,
log pi_theta - log pi_start on the student's. Fluency and tokenization cancel from both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real, Shaped

from ctpd_jax.core.arrays import Number, Scalar, at_least_float32, mask_or_all
from ctpd_jax.core.projection import project_to_tokens, response_sums, span_sums
from ctpd_jax.schema import SpanSlots

Spans = Real[ArrayLike, "*#N S"]
PerPair = Real[ArrayLike, " B"]


def span_targets(
    start: Spans, positive: Spans, reference: Spans, tau: Scalar = 1.0, clip: Number = 2.0
) -> Float[Array, "*N S"]:
    """log pi_start(p_i) + tau clip(log pi+(p_i) - log pi_ref(p_i)): where span regression wants the student.

    Args:
        start: the student's start, summed over the span's tokens, nats.
        positive, reference: the aligned teacher and what it was trained from, over the same spans.
        tau: how far the student goes where the teacher went one nat.
        clip: bound of the teacher's log-ratio of one span, both ways, nats; > 0.
    """
    ratio = at_least_float32(positive) - at_least_float32(reference)
    return at_least_float32(start) + tau * jnp.clip(ratio, -clip, clip)


def span_regression_loss(
    policy: Spans, targets: Spans, mask: Shaped[ArrayLike, "*#N S"] | None = None
) -> Float[Array, "*N"]:
    """Mean over spans of (log pi_theta(p_i) - target_i)^2, the span form: weak-to-strong regression across tokenizers.

    It carries arXiv 2410.18640 from shared tokens to shared spans. Both responses of a pair are regressed; no label is
    read. `mask` is False in padding, whose values do not matter, NaN included. Targets: `span_targets`.

    >>> span_regression_loss(jnp.array([-1.0, -2.0]), jnp.array([-1.0, -4.0]))
    Array(2., dtype=float32)
    """
    # What is masked is replaced before the square: the gradient would be NaN otherwise.
    error = at_least_float32(policy) - at_least_float32(targets)
    real = mask_or_all(mask, error.shape)
    error = jnp.where(real, error, 0)
    return jnp.square(error).sum(axis=-1) / jnp.maximum(real.sum(axis=-1), 1)


def response_errors(
    token_logps: Real[ArrayLike, "R K"], slots: SpanSlots, response_ids: Int[ArrayLike, "R K"], num_responses: int
) -> Float[Array, " N"]:
    """`span_regression_loss` of every response of a batch, wherever in its rows the tokens lie: float32 [N]."""
    # Each slot gets its span's sum; the first slot of each span then tells the error.
    span, target, share = slots
    sums = project_to_tokens(span_sums(token_logps, span, span.shape[-1]), span)
    return response_sums(share * jnp.square(jnp.where(share > 0, sums - target, 0)), response_ids, num_responses)


def teacher_margins(
    positive: Real[ArrayLike, "B 2"], reference: Real[ArrayLike, "B 2"], beta: Scalar
) -> Float[Array, " B"]:
    """beta [log pi+/pi_ref (y_w) - log pi+/pi_ref (y_l)]: the reward margin that a teacher trained by DPO gives a pair.

    positive, reference: log-probabilities of chosen and rejected. sigma of it is how sure the teacher is of the label.
    """
    rewards = at_least_float32(positive) - at_least_float32(reference)
    return beta * (rewards[:, 0] - rewards[:, 1])


def tempered_constants(
    constants: Real[ArrayLike, "B 2"], starts: Real[ArrayLike, "B 2"], beta: Scalar, spread: Scalar
) -> tuple[Float[Array, "B 2"], Float[Array, ""]]:
    """Pull the anchor towards the student's start until the root mean square of beta h at step 0 is `spread`.

        c' = c_start + kappa (c - c_start),   kappa = min(1, spread / rms(beta h_0))

    Args:
        constants: c of chosen and rejected under the teacher's reference, `reward_coefficients`.
        starts: the same with the student's start as the reference.
        beta: that of the loss.
        spread: > 0; of 1.0 and normal margins, lambda lies within [0.05, 0.95] for 99.7 % of the pairs.

    Returns:
        c' and kappa: 1 is the paper's anchor, 0 the student's start.
    """
    # At step 0 the policy is the start, so its weighted log-probability is c_start.
    anchor, start = at_least_float32(constants), at_least_float32(starts)
    returns = start - anchor
    logits = beta * (returns[:, 0] - returns[:, 1])
    rms = jnp.sqrt(jnp.mean(jnp.square(logits)))
    kappa = jnp.minimum(1.0, spread / jnp.maximum(rms, jnp.finfo(rms.dtype).tiny))
    return start + kappa * (anchor - start), kappa


def pair_labels(margins: PerPair, trust: Scalar = 1.0) -> Float[Array, " B"]:
    """(1 - trust) + trust sigma(m_T): how probably the chosen response is the better one; trust 0 leaves the label."""
    return 1 - trust + trust * jax.nn.sigmoid(at_least_float32(margins))


def sure_weights(margins: PerPair, trust: Scalar = 1.0) -> Float[Array, " B"]:
    """`pair_labels`, scaled to mean one over the data: how much a pair counts where the teacher doubts its label."""
    sure = pair_labels(margins, trust)
    return sure / jnp.maximum(jnp.mean(sure), jnp.finfo(sure.dtype).tiny)
