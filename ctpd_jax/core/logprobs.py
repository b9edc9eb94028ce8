"""Hidden states and an unembedding -> log-probabilities of given tokens, without ever holding [N, V] logits.

Letters: N scored positions, D width of the model, V vocabulary, G vocabulary groups, C = V / G rows of one group.

The usual way walks over the positions, a few at a time, each against the whole vocabulary, and its gradient adds a
[V, D] matrix at every step: for a vocabulary of 262,144 and 64 positions a step that costs more than the matmuls. Here
the loop runs over the vocabulary, all positions against one group of its rows. The log-sum-exp is kept online (arXiv
1805.02867), every row of the unembedding's gradient is written once, and a block of logits has as many entries. Forward
and backward each hold one such block; backward computes it anew (as in arXiv 2411.09009).

Group g holds the rows g, g + G, g + 2G, ...: a view of the unembedding as [C, G, D]. A vocabulary that is sharded over
devices then stays sharded inside every group, where consecutive rows would all lie on one device.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

BLOCK_BYTES = 64 * 2**20  # default size of one float32 block of logits

Precision = Any  # None, a string or a jax.lax.Precision, as jnp.einsum takes it


class _Head(NamedTuple):
    """What turns hidden states into logits, beside the matrix itself. Static: part of the compiled program."""

    vocabulary: int  # V: rows of the grouped unembedding from here on are padding
    softcap: float | None
    precision: Precision


def token_logprobs(
    hidden: Float[ArrayLike, "*slots D"],
    unembedding: Float[ArrayLike, "V D"],
    targets: Int[ArrayLike, "*slots"],
    chunk: int | None = None,
    softcap: float | None = None,
    precision: Precision = None,
) -> Float[Array, "*slots"]:
    """log softmax(cap(hidden @ unembedding.T))[targets] in nats, with cap(z) = softcap * tanh(z / softcap).

    bfloat16 operands are multiplied as they are and accumulated in float32; the result is float32, or float64 if an
    operand is. The gradient of the unembedding lives in one buffer. Works under jit, grad, vmap, shard_map and pmap, in
    reverse mode only. Give a batch as leading axes: vmap of the gradient holds one [V, D] for each example.

    Args:
        hidden: the states after the final norm. hidden[t] is scored against targets[t]: the caller shifts. Must be
            finite also in padding, whose gradient is 0 * softmax.
        targets: 0 <= targets < V; a value outside gives NaN.
        chunk: size of a block of logits, in positions: at most chunk * V logits are alive at once (never fewer than
            one for each position). By default as many as fit into 64 MB of float32.
        softcap: bound of the logits (Gemma 2), or None.
        precision: of the matmuls. By default `jax.lax.Precision.HIGHEST` for float32, because TPUs otherwise round the
            operands to bfloat16 and that error does not cancel between a policy and a reference of different models.

    Raises:
        ValueError: shapes that do not fit, chunk < 1 or softcap <= 0.

    >>> token_logprobs(jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.array([0, 3])).round(3)  # equal logits: -log 4
    Array([-1.386, -1.386], dtype=float32)
    """
    arranged = _arranged(hidden, unembedding, targets, chunk, softcap, precision)
    return _score(*arranged).reshape(jnp.shape(targets))


def token_logprobs_and_likeliest(
    hidden: Float[ArrayLike, "*slots D"],
    unembedding: Float[ArrayLike, "V D"],
    targets: Int[ArrayLike, "*slots"],
    chunk: int | None = None,
    softcap: float | None = None,
    precision: Precision = None,
) -> tuple[Float[Array, "*slots"], Bool[Array, "*slots"]]:
    """What `token_logprobs` returns, without a gradient, and whether no other token is likelier than the target."""
    top, total, at_target = _online(*_arranged(hidden, unembedding, targets, chunk, softcap, precision))
    shape = jnp.shape(targets)
    return (at_target - (top + jnp.log(total))).reshape(shape), (at_target >= top).reshape(shape)


def _arranged(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    targets: ArrayLike,
    chunk: int | None,
    softcap: float | None,
    precision: Any,
) -> tuple[Array, Array, Array, _Head]:
    """What `_score` takes: hidden [N, D], the unembedding in groups [C, G, D], targets [N], and the head."""
    hidden, unembedding, targets = jnp.asarray(hidden), jnp.asarray(unembedding), jnp.asarray(targets)
    _check(hidden, unembedding, targets, chunk, softcap)
    vocabulary, width = unembedding.shape
    # 1. How much is multiplied at once, and how exactly.
    groups = number_of_groups(max(1, targets.size), vocabulary, chunk)
    dtype = jnp.promote_types(hidden.dtype, unembedding.dtype)
    if precision is None and dtype.itemsize >= 4:
        precision = lax.Precision.HIGHEST
    # 2. Positions as one axis, the vocabulary as groups of rows.
    rows = hidden.reshape(targets.size, width).astype(dtype)
    # Rounding up to whole groups copies the unembedding; number_of_groups avoids it wherever V has a fitting divisor.
    padded = jnp.pad(unembedding.astype(dtype), ((0, -vocabulary % groups), (0, 0)))
    grouped = padded.reshape(-1, groups, width)
    # -1 lies in no group, so that its log-probability stays NaN.
    known = jnp.where((targets >= 0) & (targets < vocabulary), targets, -1)
    rows, grouped, flat_targets = _equally_varying(rows, grouped, known.reshape(-1))
    return rows, grouped, flat_targets, _Head(vocabulary, softcap, precision)


def _check(hidden: Array, unembedding: Array, targets: Array, chunk: int | None, softcap: float | None) -> None:
    if unembedding.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != unembedding.shape[1]:
        raise ValueError(
            f"token_logprobs needs hidden [..., D] and unembedding [V, D], got {hidden.shape} and {unembedding.shape}."
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"token_logprobs needs one target for each hidden state: hidden has {hidden.shape[:-1]}, "
            f"targets {targets.shape}."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"token_logprobs needs integer targets, got {targets.dtype}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"token_logprobs needs chunk >= 1, got {chunk}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"token_logprobs needs softcap > 0 or None, got {softcap}.")


def number_of_groups(positions: int, vocabulary: int, chunk: int | None) -> int:
    """Fewest groups with positions * V / groups <= chunk * V, rounded up to a divisor of V if one lies within twice."""
    if chunk is None:
        chunk = max(1, BLOCK_BYTES // (4 * vocabulary))
    fewest = min(-(-positions // chunk), vocabulary)
    divisors = (n for n in range(fewest, min(2 * fewest, vocabulary) + 1) if vocabulary % n == 0)
    return next(divisors, fewest)


def _accumulator(hidden: Array, unembedding: Array) -> Any:
    return jnp.promote_types(jnp.float32, jnp.promote_types(hidden.dtype, unembedding.dtype))


def _equally_varying(*arrays: Array) -> tuple[Array, ...]:
    """Under shard_map: let all arrays vary over the same mesh axes, so that loop carries and cotangents have one type.

    The cast's own transpose is what sums the gradient of a replicated unembedding over the devices.
    """
    axes = frozenset().union(*(_varying_axes(a) for a in arrays))
    missing = [tuple(sorted(axes - _varying_axes(a))) for a in arrays]
    return tuple(lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing))


def _varying_axes(array: Array) -> frozenset[Any]:
    return jax.typeof(array).manual_axis_type.varying


def _block_of_logits(hidden: Array, grouped: Array, group: Array, head: _Head) -> tuple[Array, Array]:
    """float32 [N, C] logits of one group, after the soft cap, and the group's rows [C, D]."""
    rows = lax.dynamic_index_in_dim(grouped, group, axis=1, keepdims=False)
    # This orientation is the fastest on CPU (no transposed operand to repack) and indifferent elsewhere.
    matmul = partial(jnp.einsum, precision=head.precision, preferred_element_type=_accumulator(hidden, grouped))
    logits = matmul("nd,cd->nc", hidden, rows)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    size, groups, _ = grouped.shape
    if size * groups != head.vocabulary:
        logits = jnp.where(jnp.arange(size) * groups + group < head.vocabulary, logits, -jnp.inf)
    return logits, rows


def _column(targets: Array, group: Array, groups: int) -> Array:
    """int [N]: the target's column in the block of this group, -1 if it lies in another group."""
    return jnp.where(targets % groups == group, targets // groups, -1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _score(
    hidden: Float[Array, "N D"], grouped: Float[Array, "C G D"], targets: Int[Array, " N"], head: _Head
) -> Float[Array, " N"]:
    """The log-probabilities; row c of group g is vocabulary entry c * G + g, and target -1 gives NaN."""
    return _score_forward(hidden, grouped, targets, head)[0]


def _score_forward(
    hidden: Array, grouped: Array, targets: Array, head: _Head
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    top, total, at_target = _online(hidden, grouped, targets, head)
    normalizer = top + jnp.log(total)
    return at_target - normalizer, (hidden, grouped, targets, normalizer)


def _online(hidden: Array, grouped: Array, targets: Array, head: _Head) -> tuple[Array, Array, Array]:
    """Online log-sum-exp: largest logit, sum of exp(logit - largest) and the target's logit, group by group."""
    dtype = _accumulator(hidden, grouped)
    groups = grouped.shape[1]

    def step(carry: tuple[Array, Array, Array], group: Array) -> tuple[tuple[Array, Array, Array], None]:
        top, total, at_target = carry
        logits, _ = _block_of_logits(hidden, grouped, group, head)
        new_top = jnp.maximum(top, logits.max(axis=1))
        # What was summed so far was relative to the old maximum.
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=1)
        column = _column(targets, group, groups)
        picked = jnp.take_along_axis(logits, jnp.maximum(column, 0)[:, None], axis=1)[:, 0]
        return (new_top, total, jnp.where(column >= 0, picked, at_target)), None

    def constant(value: float) -> Array:
        # Like hidden, so that under shard_map it varies over the same mesh axes as what the loop returns.
        return jnp.full_like(hidden, value, dtype, targets.shape)

    start = (constant(-jnp.inf), constant(0.0), constant(jnp.nan))
    return lax.scan(step, start, jnp.arange(groups))[0]


def _score_backward(
    head: _Head, residuals: tuple[Array, Array, Array, Array], cotangent: Float[Array, " N"]
) -> tuple[Array, Array, None]:
    """With p = softmax: d logit[n, v] = cotangent[n] * (1[v = target n] - p[n, v]), times the slope of the soft cap."""
    hidden, grouped, targets, normalizer = residuals
    size, groups, _ = grouped.shape
    dtype = _accumulator(hidden, grouped)
    matmul = partial(jnp.einsum, precision=head.precision, preferred_element_type=dtype)

    def step(carry: tuple[Array, Array], group: Array) -> tuple[tuple[Array, Array], None]:
        hidden_gradient, grouped_gradient = carry
        # The same block as in the forward pass, computed anew rather than kept.
        logits, rows = _block_of_logits(hidden, grouped, group, head)
        is_target = _column(targets, group, groups)[:, None] == jnp.arange(size)
        slope = cotangent[:, None] * (is_target - jnp.exp(logits - normalizer[:, None]))
        if head.softcap is not None:
            # d cap / dz = 1 - (cap / softcap)^2; logits of padding are -inf.
            slope = jnp.where(jnp.isfinite(logits), slope * (1 - jnp.square(logits / head.softcap)), 0)
        slope = slope.astype(hidden.dtype)
        # This group's part of both products; its rows of the unembedding's gradient are written once.
        hidden_gradient = hidden_gradient + matmul("nc,cd->nd", slope, rows)
        rows_gradient = matmul("nc,nd->cd", slope, hidden).astype(grouped.dtype)
        return (hidden_gradient, lax.dynamic_update_index_in_dim(grouped_gradient, rows_gradient, group, 1)), None

    start = (jnp.zeros_like(hidden, dtype), jnp.zeros_like(grouped))
    (hidden_gradient, grouped_gradient), _ = lax.scan(step, start, jnp.arange(groups))
    return hidden_gradient.astype(hidden.dtype), grouped_gradient, None


_score.defvjp(_score_forward, _score_backward)
