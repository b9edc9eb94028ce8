"""Between tokens and spans: sums, means and counts of a span's tokens, and a span's value given back to its tokens.

Letters: T tokens, S spans, ... any leading axes (responses of a batch).

Every function takes leading axes, so that ragged responses can share one compilation: pad T and S to a few sizes,
with span id -1 on padding tokens; padding spans then have no tokens, hence sum 0 and count 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ctpd_jax.core.arrays import at_least_float32


def span_sums(token_values: ArrayLike, span_ids: ArrayLike, num_spans: int) -> jax.Array:
    """Sum of the token values of each span: log pi(p_i) = sum_{t in span i} log pi(y_t) (arXiv 2601.11865).

    Args:
        token_values: float [..., T].
        span_ids: int [..., T], 0..S-1 in any order; -1 (or any id outside) for tokens of no span, whose value does not
            matter, NaN included.
        num_spans: S, a Python int.

    Returns:
        float32 [..., S] (float64 if the values are); 0 for a span without tokens.
    """
    values, ids = jnp.broadcast_arrays(jnp.asarray(token_values), jnp.asarray(span_ids))
    covered = (ids >= 0) & (ids < num_spans)
    flat_values = jnp.where(covered, at_least_float32(values), 0).reshape(-1, ids.shape[-1])
    flat_ids = jnp.where(covered, ids, num_spans).reshape(flat_values.shape)
    # num_spans is an index out of bounds, and segment_sum drops those.
    sums = jax.vmap(lambda v, i: jax.ops.segment_sum(v, i, num_segments=num_spans))(flat_values, flat_ids)
    return sums.reshape(*ids.shape[:-1], num_spans)


def span_counts(span_ids: ArrayLike, num_spans: int) -> jax.Array:
    """Number of tokens in each span: int [..., T] -> float32 [..., S], 0 exactly where the span is padding."""
    ids = jnp.asarray(span_ids)
    return span_sums(jnp.ones(ids.shape, jnp.float32), ids, num_spans)


def span_means(token_values: ArrayLike, span_ids: ArrayLike, num_spans: int) -> jax.Array:
    """Mean of the token values of each span, over the span's own tokens. Shapes as `span_sums`; 0 without tokens."""
    return span_sums(token_values, span_ids, num_spans) / jnp.maximum(span_counts(span_ids, num_spans), 1)


def project_to_tokens(span_values: ArrayLike, span_ids: ArrayLike) -> jax.Array:
    """Each token gets its span's value: w_span(t).

    Args:
        span_values: float [..., S].
        span_ids: int [..., T], 0..S-1, or -1 for tokens of no span.

    Returns:
        [..., T] in the dtype of the span values; 0 where the span id is outside 0..S-1.
    """
    values, ids = jnp.asarray(span_values), jnp.asarray(span_ids)
    lead = jnp.broadcast_shapes(values.shape[:-1], ids.shape[:-1])
    values = jnp.broadcast_to(values, (*lead, values.shape[-1]))
    ids = jnp.broadcast_to(ids, (*lead, ids.shape[-1]))
    covered = (ids >= 0) & (ids < values.shape[-1])
    if values.shape[-1] == 0:
        return jnp.zeros(ids.shape, values.dtype)
    return jnp.where(covered, jnp.take_along_axis(values, jnp.where(covered, ids, 0), axis=-1), 0)


def span_mask(num_spans: ArrayLike, size: int) -> jax.Array:
    """Which of `size` padded spans are real: int [...] -> bool [..., size], True for the first num_spans."""
    return jnp.arange(size) < jnp.asarray(num_spans)[..., None]
