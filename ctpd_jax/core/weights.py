"""Importance weights of spans (or tokens), their transforms, and what to report about them.

Letters: S spans of one response, N responses.

Every function takes [*N, S] and a `mask`, True for real spans; without one all are real. Padding gets weight 0, and its
inputs do not matter, NaN included: pad ragged responses to a few sizes, and JAX compiles once for each. Results are
float32 (float64 for float64). Weights are data: take their gradient only if you mean to.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, Real, Shaped

from ctpd_jax.core.arrays import Number, SumAndCount, at_least_float32, mask_or_all, masked_sum_and_count

Spans = Real[ArrayLike, "*#N S"]
Mask = Shaped[ArrayLike, "*#N S"]  # bool or 0/1
Weights = Float[Array, "*N S"]


def importance_weights(
    logp_positive: Spans,
    logp_negative: Spans,
    mu: Real[ArrayLike, "*mu"] = 1.0,
    k: Real[ArrayLike, "*k"] = 1.0,
    lower: Number = -0.5,
    upper: Number = 1.5,
    mask: Mask | None = None,
) -> Weights:
    """w_i = k * exp(mu * clip(d_i, lower, upper)), d_i = log pi+(p_i) - log pi-(p_i) (arXiv 2601.11865; 2410.04350).

    The clip comes before the sign: with the defaults chosen weights (mu = 1) lie in [0.61, 4.48] and rejected ones
    (mu = -1) in [0.22, 1.65].

    E_D[w f] = E_D*[f] holds exactly, for D* proportional to w D, only if E_D[w] = 1: data from pi- with mu = 1 and no
    clip (D* = pi+), data from pi+ with mu = -1 (D* = pi-), or with a clip k = 1 / E_D[exp(mu * clip(d))].

    Args:
        logp_positive, logp_negative: log-probabilities of each span under the two contrastive models, nats.
        mu: +1 for chosen, -1 for rejected responses; a number, or an array that broadcasts, such as [N, 1].
        k: scale, likewise.
        lower, upper: bounds of d; -inf and inf switch the clip off.

    >>> importance_weights(jnp.array([-1.0, -1.0]), jnp.array([-1.0, -3.0])).round(2)  # d = 0, and 2 clipped to 1.5
    Array([1.  , 4.48], dtype=float32)
    """
    positive, negative = at_least_float32(logp_positive), at_least_float32(logp_negative)
    positive, negative = jnp.broadcast_arrays(positive, negative)
    real = mask_or_all(mask, positive.shape)
    # Padding is replaced before the exponential: its NaN or infinity would reach the gradient otherwise.
    ratio = jnp.where(real, positive, 0) - jnp.where(real, negative, 0)
    weights = k * jnp.exp(mu * jnp.clip(ratio, lower, upper))
    return jnp.where(real, weights, 0)


def threshold_weights(weights: Spans, lower: Number = 0.3, upper: Number = 1.6, mask: Mask | None = None) -> Weights:
    """Clip the weights: clip(w, lower, upper)."""
    values = at_least_float32(weights)
    return jnp.where(mask_or_all(mask, values.shape), jnp.clip(values, lower, upper), 0)


def scale_weights(
    weights: Spans,
    lower: Number = 0.2,
    upper: Number = 1.8,
    new_lower: Number = 0.3,
    new_upper: Number = 1.7,
    mask: Mask | None = None,
) -> Weights:
    """Clip the weights to [lower, upper], then map that interval onto [new_lower, new_upper]."""
    # The share of the way from the one bound to the other.
    values = at_least_float32(weights)
    share = (jnp.clip(values, lower, upper) - lower) / (upper - lower)
    return jnp.where(mask_or_all(mask, values.shape), new_lower + share * (new_upper - new_lower), 0)


def rank_weights(weights: Spans, lowest: Number = 0.6, highest: Number = 2.0, mask: Mask | None = None) -> Weights:
    """lowest + (highest - lowest) * i / (n - 1), i = 0..n-1 the ascending rank of w among the response's n real spans.

    Equal weights share the mean of their ranks, because a clip makes many weights equal and their order in the text
    must not decide. A response of one span gets `lowest` (rank 0).

    >>> rank_weights(jnp.array([0.5, 4.0, 4.0]), lowest=0, highest=2)
    Array([0. , 1.5, 1.5], dtype=float32)
    """
    values = at_least_float32(weights)
    real = mask_or_all(mask, values.shape)

    @partial(jnp.vectorize, signature="(s),(s)->(s)")
    def mean_rank(row: Array, real_row: Array) -> Array:
        row = jnp.where(real_row, row, jnp.inf)  # padding ranks last, behind every real span
        ordered = jnp.sort(row)
        # A run of equal weights fills the places below..up_to-1; its mean is shared.
        below = jnp.searchsorted(ordered, row, side="left")
        up_to = jnp.searchsorted(ordered, row, side="right")
        return (below + up_to - 1) / 2

    rank = mean_rank(values, real).astype(values.dtype)
    # A single span has rank 0 of 0, hence the maximum.
    spans = real.sum(axis=-1, keepdims=True)
    weight = lowest + (highest - lowest) * rank / jnp.maximum(spans - 1, 1)
    return jnp.where(real, weight, 0)


def binary_weights(weights: Spans, percent: Number = 50.0, mask: Mask | None = None) -> Weights:
    """Give 1 to the top `percent` of the response's n real spans, 0 to the rest.

    Exactly ceil(percent / 100 * n) spans are kept, the largest weights first; among equal ones the earlier span.
    """
    values = at_least_float32(weights)
    real = mask_or_all(mask, values.shape)

    @partial(jnp.vectorize, signature="(s),(s)->(s)")
    def descending_rank(row: Array, real_row: Array) -> Array:
        # Stable, so that the earlier of two equal spans is kept; padding sorts behind every real span.
        order = jnp.argsort(jnp.where(real_row, -row, jnp.inf), stable=True)
        return jnp.zeros_like(order).at[order].set(jnp.arange(order.size))

    spans = real.sum(axis=-1, keepdims=True)
    # The small term keeps float32 rounding of, say, 30 % of 10 from becoming one span more.
    kept = jnp.ceil(percent * spans / 100 - 1e-4)
    return jnp.where(real & (descending_rank(values, real) < kept), 1, 0).astype(values.dtype)


def mean_one_weights(weights: Spans, mask: Mask | None = None) -> Weights:
    """w_i / mean(w): each response counts as much as without weights. A response without weight keeps none."""
    values = at_least_float32(weights)
    values = jnp.where(mask_or_all(mask, values.shape), values, 0)
    spans = mask_or_all(mask, values.shape).sum(axis=-1, keepdims=True)
    total = values.sum(axis=-1, keepdims=True)
    return values * spans / jnp.where(total > 0, total, 1)


def agreeing_weights(weights: Spans, k: Number = 1.0, mask: Mask | None = None) -> Weights:
    """Keep w where w >= k, which is mu * d >= 0; give 0 where the contrastive pair contradicts the label."""
    values = at_least_float32(weights)
    return jnp.where(mask_or_all(mask, values.shape) & (values >= k), values, 0)


def uniform_weights(mask: Mask) -> Weights:
    """Give 1 to each real span: the ablation without weights."""
    return jnp.asarray(mask, bool).astype(jnp.float32)


def random_weights(key: Key[Array, "*#N"], mask: Mask, lower: Number = 0.7, upper: Number = 1.3) -> Weights:
    """Draw uniformly from [lower, upper): the ablation "random".

    One typed key (jax.random.key) for each response: fold the example's number and its side into one seed, so that a
    response keeps its weights wherever it turns up. A span's weight does not depend on how far its response is padded.
    """
    real = jnp.asarray(mask, bool)
    keys = jnp.broadcast_to(key, real.shape[:-1])
    # A key for each span, rather than S draws from one key, makes the draws independent of S.
    span_keys = jax.vmap(lambda one: jax.vmap(lambda i: jax.random.fold_in(one, i))(jnp.arange(real.shape[-1])))
    draws = jax.vmap(lambda one: jax.random.uniform(one, minval=lower, maxval=upper))(
        span_keys(keys.reshape(-1)).reshape(-1)
    )
    return jnp.where(real, draws.reshape(real.shape), 0)


def weight_diagnostics(
    logp_positive: Spans,
    logp_negative: Spans,
    weights: Spans,
    lower: Number = -0.5,
    upper: Number = 1.5,
    mask: Mask | None = None,
) -> dict[str, SumAndCount]:
    """What to watch about weights, each as (sum, count): add over batches and hosts, divide once.

    Keys: `clipped_low` and `clipped_high`, the shares of spans whose d lies beyond a bound; `log_ratio`, the mean of d,
    and `log_ratio_square`, of d * d (large swings inside one response mean noise in the label: Theorem 1 of arXiv
    2601.11865); `weight` and `weight_square`, whose ratio mean(w)^2 / mean(w^2) is the effective share of spans.
    """
    # Padding may hold NaN, which no mask takes out of a product again.
    weight = at_least_float32(weights)
    real = mask_or_all(mask, weight.shape)
    ratio = jnp.where(real, at_least_float32(logp_positive), 0) - jnp.where(real, at_least_float32(logp_negative), 0)
    return {
        "clipped_low": masked_sum_and_count(ratio < lower, real),
        "clipped_high": masked_sum_and_count(ratio > upper, real),
        "log_ratio": masked_sum_and_count(ratio, real),
        "log_ratio_square": masked_sum_and_count(jnp.square(ratio), real),
        "weight": masked_sum_and_count(weight, real),
        "weight_square": masked_sum_and_count(jnp.square(weight), real),
    }
