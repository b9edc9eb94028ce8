"""How a model is run on a mesh, and the log-probabilities that everything in training and annotation comes from.

Letters: R rows, L row length, K scored tokens of a row, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from ctpd_jax.core.logprobs import BLOCK_BYTES, token_logprobs, token_logprobs_and_likeliest
from ctpd_jax.models.attention_backends import Backend
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, Remat, hidden_states, unembedding
from ctpd_jax.schema import Array, Batch
from ctpd_jax.sharding import ROWS, constrain


@dataclass(frozen=True)
class Compute:
    """How a model is run: the dtype of its products, what is kept for the backward pass, how it attends, and where."""

    dtype: str = "float32"
    remat: Remat = "dots"
    attention: Backend = "plain"
    mesh: Mesh | None = None


def scored_logprobs(config: DecoderConfig, params: Params, batch: Batch, compute: Compute) -> Array:
    """Returns log pi(target | everything before) of each scored slot: float32 [R, K], 0 in padding."""
    return logprobs_of(config, params, scored_states(config, params, batch, compute), batch, compute)


def scored_states(config: DecoderConfig, params: Params, batch: Batch, compute: Compute) -> Array:
    """Returns the hidden state that predicts each scored slot: [R, K, D] in the compute dtype."""
    mesh, dtype = compute.mesh, jnp.dtype(compute.dtype)
    hidden = hidden_states(config, params, batch.tokens, batch.layout, compute.remat, dtype, compute.attention, mesh)
    # Only scored positions meet the vocabulary: a prompt's logits would cost as much and nobody asks for them.
    return jnp.take_along_axis(hidden, batch.predictor[..., None], axis=1)


def scored_and_likeliest(config: DecoderConfig, params: Params, batch: Batch, compute: Compute) -> tuple[Array, Array]:
    """Returns what `scored_logprobs` does, and whether no token is likelier than the target: bool [R, K]."""
    scored = scored_states(config, params, batch, compute)
    return token_logprobs_and_likeliest(**_head(config, params, scored, batch, compute))


def logprobs_of(config: DecoderConfig, params: Params, scored: Array, batch: Batch, compute: Compute) -> Array:
    """Returns what `scored_logprobs` does, given the states [R, K, D]."""
    logps = token_logprobs(**_head(config, params, scored, batch, compute))
    return jnp.where(batch.pair >= 0, logps, 0.0)


def _head(config: DecoderConfig, params: Params, scored: Array, batch: Batch, compute: Compute) -> dict[str, Any]:
    mesh, head = compute.mesh, unembedding(config, params).astype(scored.dtype)
    # The block of logits is spread over the devices, so that each may have one of the usual size.
    chunk = max(1, BLOCK_BYTES // (4 * config.vocab_size)) * (1 if mesh is None else mesh.devices.size)
    return {
        "hidden": constrain(mesh, scored, ROWS, None, None),
        "unembedding": head,
        "targets": batch.target,
        "chunk": chunk,
        "softcap": config.final_softcap,
    }
