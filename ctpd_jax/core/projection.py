"""Between tokens, spans and responses: add up a span's or a response's tokens, and give a span's value to its tokens.

Letters: T tokens of a response, S its spans, N responses of a batch.

Responses are ragged and JAX wants few shapes: pad T and S to a few sizes, with id -1 on padding tokens. Padding spans
then have no tokens, hence sum 0 and count 0.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real, Shaped

from ctpd_jax.core.arrays import at_least_float32


def response_sums(
    token_values: Real[ArrayLike, "*slots"], response_ids: Int[ArrayLike, "*slots"], num_responses: int
) -> Float[Array, " N"]:
    """Add up the token values of each response, wherever in the batch its tokens lie.

        log pi(y_n | x) = sum_{t: id(t) = n} log pi(y_t | x, y_<t)

    Args:
        token_values: any shape: rows may hold one response or several.
        response_ids: 0..N-1 in any order. Values at other ids do not matter, NaN included.
        num_responses: N, a Python int. The sum of a response without tokens is 0.

    >>> response_sums(jnp.array([[1.0, 2.0], [4.0, 8.0]]), jnp.array([[0, 1], [1, -1]]), 2)
    Array([1., 6.], dtype=float32)
    """
    ids = jnp.asarray(response_ids)
    # segment_sum drops an id out of bounds with its value, and gives it gradient 0; a negative one would count from the
    # end. The values themselves are not masked: a select behind a product keeps XLA from fusing it into the sum.
    places = jnp.where((ids >= 0) & (ids < num_responses), ids, num_responses)
    return jax.ops.segment_sum(at_least_float32(token_values).ravel(), places.ravel(), num_segments=num_responses)


def span_sums(
    token_values: Real[ArrayLike, "*#batch T"], span_ids: Int[ArrayLike, "*#batch T"], num_spans: int
) -> Float[Array, "*batch S"]:
    """Add up the token values of each span of each response (arXiv 2601.11865, Aligned Span Projection).

        log pi(p_i) = sum_{t in span i} log pi(y_t)

    Args:
        token_values: float of any width; sums are float32, or float64 for float64.
        span_ids: 0..S-1 in any order; -1, or any id outside, for tokens of no span, whose value does not matter, NaN
            included.
        num_spans: S, a Python int. The sum of a span without tokens is 0.

    >>> span_sums(jnp.array([-1.0, -2.0, -4.0]), jnp.array([0, 0, 1]), 2)
    Array([-3., -4.], dtype=float32)
    """
    # One row after the other: a span is to its response what a response is to its batch.
    values, ids = jnp.broadcast_arrays(jnp.asarray(token_values), jnp.asarray(span_ids))
    rows = (-1, ids.shape[-1])
    sums = jax.vmap(partial(response_sums, num_responses=num_spans))(values.reshape(rows), ids.reshape(rows))
    return sums.reshape(*ids.shape[:-1], num_spans)


def span_counts(span_ids: Int[ArrayLike, "*batch T"], num_spans: int) -> Float[Array, "*batch S"]:
    """Count the tokens of each span, as float32: 0 exactly where the span is padding."""
    ids = jnp.asarray(span_ids)
    return span_sums(jnp.ones(ids.shape, jnp.float32), ids, num_spans)


def span_means(
    token_values: Real[ArrayLike, "*#batch T"], span_ids: Int[ArrayLike, "*#batch T"], num_spans: int
) -> Float[Array, "*batch S"]:
    """Average the token values of each span over the span's own tokens; otherwise as `span_sums`."""
    return span_sums(token_values, span_ids, num_spans) / jnp.maximum(span_counts(span_ids, num_spans), 1)


def project_to_tokens(
    span_values: Shaped[ArrayLike, "*#batch S"], span_ids: Int[ArrayLike, "*#batch T"]
) -> Shaped[Array, "*batch T"]:
    """Give each token the value of its span, w_span(t): the adjoint of `span_sums` (arXiv 2601.11865).

    The result has the dtype of the span values, and is 0 where the id is outside 0..S-1.

    >>> project_to_tokens(jnp.array([0.5, 2.0]), jnp.array([0, 0, 1, -1]))
    Array([0.5, 0.5, 2. , 0. ], dtype=float32)
    """
    values, ids = jnp.asarray(span_values), jnp.asarray(span_ids)
    num_spans = values.shape[-1]
    lead = jnp.broadcast_shapes(values.shape[:-1], ids.shape[:-1])
    values = jnp.broadcast_to(values, (*lead, num_spans))
    ids = jnp.broadcast_to(ids, (*lead, ids.shape[-1]))
    if num_spans == 0:
        return jnp.zeros(ids.shape, values.dtype)
    # The index is made valid first and the result masked after, so that padding never reads another span's value.
    covered = (ids >= 0) & (ids < num_spans)
    return jnp.where(covered, jnp.take_along_axis(values, jnp.where(covered, ids, 0), axis=-1), 0)
