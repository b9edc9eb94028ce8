"""Attention over rows that may hold several segments, and rotary positions.

Letters: R rows, T tokens of a row (queries), S keys, H query heads, K key-value heads, G = H / K query heads to a
key-value head, D head_dim.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.models.config import DecoderConfig, Rope
from ctpd_jax.schema import RowLayout

# Queries at a time: a block sees no key after its own end, so short blocks skip nearly half of the T x T products, and
# their scores stay in the cache.
QUERY_BLOCK = 128
_MASKED = -1e30  # finite: a row of padding sees nobody, and must not become NaN


def causal_layout(rows: int, length: int) -> RowLayout:
    """Return the layout of `rows` plain sequences without padding: one segment each, positions 0..length-1."""
    ones = jnp.ones((rows, length), jnp.int32)
    return RowLayout(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)), ones, ones)


def visible(row: RowLayout, window: int | None, keys: RowLayout | None = None) -> jax.Array:
    """Return bool [R, T, S], whether query i sees key j; no other place decides that.

    It does where j is not after i in the row; j is no padding (segment 0); j is of i's segment or of its parent; and,
    with a window, j lies less than `window` positions (not places in the row) before i.

    Args:
        row: the queries, int32 [R, T] each.
        window: a sliding window in positions, or None.
        keys: the keys, int32 [R, S] each, where they are a cache that holds nothing later than the queries; None: the
            keys are the row itself.
    """
    # 1. Of the same segment, or of the prompt that it continues; never padding.
    seen_from = row if keys is None else keys
    segment = seen_from.segment[:, None, :]
    seen = ((segment == row.segment[:, :, None]) | (segment == row.parent[:, :, None])) & (segment != 0)
    # 2. Not later in the row; a cache holds nothing later.
    if keys is None:
        length = row.segment.shape[-1]
        seen &= jnp.tril(jnp.ones((length, length), bool))
    # 3. Not too far back.
    if window is not None:
        seen &= row.positions[:, :, None] - seen_from.positions[:, None, :] < window
    return seen


def masks(config: DecoderConfig, row: RowLayout, keys: RowLayout | None = None) -> jax.Array:
    """Return who sees whom in every kind of layer, bool [kinds, R, T, S]; see `visible`."""
    return jnp.stack([visible(row, kind.window, keys) for kind in config.kinds])


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    row_by_row: bool | None = None,
) -> jax.Array:
    """Attend from every query to the keys that it sees.

    Args:
        q: [R, T, H, D], rotary positions applied.
        k, v: [R, S, K, D]; H is a multiple of K, and query head h uses key-value head h // (H / K).
        seen: bool [R, T, S] from `visible`.
        scale: multiplies the products of queries and keys.
        softcap: scores become softcap * tanh(scores / softcap).
        causal: promises that T == S and that no query sees a later key, so that later keys are not even read.
        row_by_row: on a CPU that keeps the scores in the cache (twice the speed of all rows at once at 4 x 512 tokens);
            other devices want all the parallelism there is. None: by JAX's default device.

    Returns:
        [R, T, H, D] in q's dtype. The softmax is float32. A query that sees no key, as padding may, gets a finite value
        without meaning. In the backward pass the scores, H * T * S numbers a row and layer, are computed again instead
        of being kept.
    """
    # The backward pass computes a row's scores again: kept, they would be the largest arrays of a layer.
    rows = q.shape[0]
    one_row = jax.checkpoint(partial(_attend_row, scale=scale, softcap=softcap, causal=causal))
    if row_by_row is None:
        row_by_row = jax.default_backend() == "cpu"
    if rows == 1 or not row_by_row:
        return jax.vmap(one_row)(q, k, v, seen)
    return jax.lax.map(lambda row: one_row(*row), (q, k, v, seen))


def _attend_row(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float, softcap: float | None, causal: bool
) -> jax.Array:
    """Attend in one row: q [T, H, D], k and v [S, K, D], seen [T, S] -> [T, H, D]."""
    length, heads, dim = q.shape
    kv_heads = k.shape[1]
    # Heads first, the query heads of one key-value head side by side.
    q = (q * jnp.asarray(scale, q.dtype)).reshape(length, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)
    k, v = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        keys = stop if causal else k.shape[1]
        blocks.append(_attend_block(q[:, :, start:stop], k[:, :keys], v[:, :keys], seen[start:stop, :keys], softcap))
    out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)
    return out.transpose(2, 0, 1, 3).reshape(length, heads, dim)


def _attend_block(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, softcap: float | None) -> jax.Array:
    """Attend in one block: q [K, G, T, D], k and v [K, S, D], seen [T, S] -> [K, G, T, D]."""
    # The G query heads of a key-value head are one matrix of G * T rows: plain products, batched over K alone.
    kv_heads, group, length, dim = q.shape
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    scores = product("kmd,ksd->kms", q.reshape(kv_heads, group * length, dim), k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores.reshape(kv_heads, group, length, -1), _MASKED)
    # The softmax, divided out after the sum over values, which is smaller.
    # The maximum only keeps exp in range: its gradient cancels, so none is computed.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1)
    out = product("kms,ksd->kmd", weights.reshape(kv_heads, group * length, -1).astype(v.dtype), v)
    return (out.reshape(kv_heads, group, length, dim) / total[..., None]).astype(q.dtype)


# ------------------------------------------------------------------------------------------------ positions


def rope_frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Return radians a position, float32 [dim/2]."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = np.float32(1.0) / np.float32(rope.theta) ** exponent
    if rope.scaling == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.scaling == "yarn":
        # The dimensions, not whole, that turn so often over the original context; outwards to whole ones.
        lengths = [rope.original_max_positions / (2 * np.pi * beta) for beta in (rope.beta_fast, rope.beta_slow)]
        low, high = (dim * np.log(length) / (2 * np.log(rope.theta)) for length in lengths)
        low, high = max(np.floor(low), 0), min(np.ceil(high), dim - 1)
        ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low if high > low else 0.001)
        divided = np.clip(ramp, 0, 1).astype(np.float32)
        return (divided * frequencies / np.float32(rope.factor) + (1 - divided) * frequencies).astype(np.float32)
    if rope.scaling == "longrope":
        return frequencies / np.asarray(rope.short_factor, np.float32)
    if rope.scaling == "llama3":
        # Wavelengths above original / low are divided by factor, below original / high kept, a ramp between.
        turns = rope.original_max_positions * frequencies / np.float32(2 * np.pi)  # over the original context
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(ramp, 0, 1).astype(np.float32)
        return ((1 - keep) * frequencies / np.float32(rope.factor) + keep * frequencies).astype(np.float32)
    return frequencies


def rope_table(rope: Rope | None, dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines, float32 [R, T, dim/2], of integer positions [R, T]; without a rope, of the angle 0."""
    if rope is None:
        one = jnp.ones((*positions.shape, dim // 2), jnp.float32)
        return one, jnp.zeros_like(one)
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, dim)
    return jnp.cos(angles) * rope.amplitude, jnp.sin(angles) * rope.amplitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x[d], x[d + P]), d < P, of x [R, T, heads, D] by the angles of cos, sin [R, T, P]; 2 P <= D."""
    turned = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return out if turned == x.shape[-1] else jnp.concatenate([out, x[..., turned:]], axis=-1)


@jax.custom_vjp
def rotate_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Compute `rotate`, the halves exchanged by a product with a permutation; without a gradient of the angles.

    To the bit the same, for every element is multiplied with a one and added to zeros. A TPU holds D in the lanes of
    its registers: there halves cost several passes over all heads, and the product next to nothing.
    """
    turned, dim = 2 * cos.shape[-1], x.shape[-1]
    exchange = np.zeros((dim, dim), np.float32)
    exchange[:turned, :turned] = np.roll(np.eye(turned), turned // 2, axis=1)
    exchanged = jnp.einsum(
        "rthd,de->rthe",
        x,
        jnp.asarray(exchange, x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # What is not turned stays as it is: times 1, plus 0.
    still = jnp.ones((*cos.shape[:-1], dim - turned), cos.dtype)
    cos, sin = jnp.concatenate([cos, cos, still], axis=-1), jnp.concatenate([-sin, sin, 0 * still], axis=-1)
    return (x.astype(jnp.float32) * cos[:, :, None, :] + exchanged * sin[:, :, None, :]).astype(x.dtype)


def _rotate_forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rotate_by_product(x, cos, sin), (cos, sin)


def _rotate_backward(angles: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = angles
    return rotate_by_product(gradient, cos, -sin), None, None  # turned back


rotate_by_product.defvjp(_rotate_forward, _rotate_backward)
