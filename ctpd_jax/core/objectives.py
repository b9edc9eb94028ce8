"""Objectives beyond the paper's: what the teacher knows enters as a target for each span.

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


def pair_labels(margins: PerPair, trust: Scalar = 1.0) -> Float[Array, " B"]:
    """(1 - trust) + trust sigma(m): how probably the chosen response is the better one; trust 0 leaves the label."""
    return 1 - trust + trust * jax.nn.sigmoid(at_least_float32(margins))


def sure_weights(margins: PerPair, trust: Scalar = 1.0) -> Float[Array, " B"]:
    """`pair_labels`, scaled to mean one over the data: how much a pair counts where its margin is in doubt."""
    sure = pair_labels(margins, trust)
    return sure / jnp.maximum(jnp.mean(sure), jnp.finfo(sure.dtype).tiny)
