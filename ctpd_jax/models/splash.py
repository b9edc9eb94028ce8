"""Splash attention, Pallas' flash attention for TPUs, as two of the back ends of `attention_backends.make_attend`.

Elsewhere the kernels are interpreted, which is slow and for tests.

Letters: R rows, T tokens of a row, H query heads, K key-value heads, D head_dim, N kinds of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import LocalMask, MultiHeadMask
from jax.sharding import Mesh

from ctpd_jax.sharding import on_own_rows

# How many queries, and keys, the kernels may work on at a time; the largest that divides the row. A row whose length
# is no multiple of the smallest is padded.
_BLOCKS = (512, 256, 128)


def masked_attend(
    seen: jax.Array, scale: float, softcap: float | None, mesh: Mesh | None = None
) -> Callable[..., jax.Array]:
    """Make (q, k, v, kind) -> attention, who sees whom read block by block from `seen`, bool [N, R, T, T]."""
    # 1. Which blocks hold anything, for every kind of layer and every row.
    length = seen.shape[-1]
    padded, block = _blocks(length)
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, padded - length), (0, padded - length)))
    seen |= jnp.eye(padded, dtype=bool)  # a query that sees nobody, as padding may, would divide by zero

    def blocks_of(seen: jax.Array) -> tuple[Any, Any]:
        kernel = _make_kernel(seen[None], block, softcap, interpret=False)
        # The library keeps a flag among these arrays and asks for it in Python, where under jit it has no value. It
        # decides no more than the name of a scope.
        forward, backward = kernel.fwd_mask_info, kernel.dkv_mask_info
        return forward._replace(is_dynamic_mask=None), backward._replace(is_dynamic_mask=None)

    every = jax.vmap(jax.vmap(blocks_of))(seen)

    # 2. The kernel over them, row by row.
    def rows(interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, blocks: tuple[Any, Any]) -> jax.Array:
        def row(q: jax.Array, k: jax.Array, v: jax.Array, blocks: tuple[Any, Any]) -> Any:
            forward, backward = blocks  # the gradient of the queries takes the same ones as the forward pass
            return kernels.SplashAttentionKernel(
                forward,
                forward,
                backward,
                block_sizes=_block_sizes(block),
                is_mqa=False,
                save_residuals=False,
                mask_value=kernels.DEFAULT_MASK_VALUE,
                attn_logits_soft_cap=softcap,
                residual_checkpoint_name=None,
                mask_function=None,
                interpret=interpret,
            )(q, k, v)

        return jax.vmap(row)(q, k, v, blocks)

    local = on_own_rows(mesh, lambda q, k, v, blocks: _call(rows, q, k, v, blocks, scale, padded))
    return lambda q, k, v, kind: local(q, k, v, jax.tree.map(lambda leaf: leaf[kind], every))


def segmented_attend(
    windows: tuple[int | None, ...], segment: jax.Array, scale: float, softcap: float | None, mesh: Mesh | None = None
) -> Callable[..., jax.Array]:
    """Make (q, k, v, kind) -> attention to the earlier tokens of the same segment; no T x T array anywhere.

    Args:
        windows: of each kind of layer, in positions or None. They are counted in places of the row, which is the same
            as long as a segment is one piece of its row and its positions rise by one.
        segment: int32 [R, T]. Padding sees padding here: finite, and read by nobody.
    """
    length = segment.shape[-1]
    padded, block = _blocks(length)
    segment = jnp.pad(segment, ((0, 0), (0, padded - length)))

    def branch(window: int | None) -> Callable[..., jax.Array]:
        def rows(interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
            mask = LocalMask((padded, padded), (None if window is None else window - 1, 0), offset=0)
            kernel: Any = _make_kernel(MultiHeadMask([mask]), block, softcap, interpret)
            return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))(q, k, v, segment)

        return on_own_rows(mesh, lambda q, k, v, segment: _call(rows, q, k, v, segment, scale, padded))

    # One program for each window rather than for each kind: kinds may differ in their rope alone.
    distinct = tuple(dict.fromkeys(windows))
    branches = [branch(window) for window in distinct]
    if len(branches) == 1:
        return lambda q, k, v, kind: branches[0](q, k, v, segment)
    program = jnp.asarray([distinct.index(window) for window in windows], jnp.int32)
    return lambda q, k, v, kind: jax.lax.switch(program[kind], branches, q, k, v, segment)


def _call(
    rows: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, extra: Any, scale: float, padded: int
) -> jax.Array:
    """Call rows(interpret, q, k, v, extra) with scaled queries, heads before tokens and rows of the padded length."""
    length = q.shape[1]

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    arrays = (heads_first(q * jnp.asarray(scale, q.dtype)), heads_first(k), heads_first(v), extra)
    # Whether to interpret is decided by the platform that the program is compiled for, not by the one that traces it.
    out = jax.lax.platform_dependent(*arrays, tpu=partial(rows, False), default=partial(rows, True))
    return out.swapaxes(1, 2)[:, :length]


def _blocks(length: int) -> tuple[int, int]:
    """Return the length that a row is padded to, and the block that divides it."""
    padded = -(-length // _BLOCKS[-1]) * _BLOCKS[-1]
    return padded, next(block for block in _BLOCKS if padded % block == 0)


def _block_sizes(block: int) -> kernels.BlockSizes:
    return kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )


def _make_kernel(mask: Any, block: int, softcap: float | None, interpret: bool) -> Any:
    """Make the kernel of one row, from a mask that all heads share: MultiHeadMask or bool [1, T, T]."""
    return kernels.make_splash_mha(
        mask,
        block_sizes=_block_sizes(block),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
