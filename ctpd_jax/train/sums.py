"""What the gradient of a training stage is taken of: summed losses, and the sums that are logged beside them.

Every number is a pair (sum, count) until it is logged, so that neither the split into micro-batches nor the devices
change it.

Letters: R rows, K scored tokens of a row, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ctpd_jax.core.losses import (
    lambda_diagnostics,
    preference_loss,
    response_returns,
    reward_metrics,
    sft_loss,
    sft_term,
)
from ctpd_jax.core.objectives import response_errors
from ctpd_jax.core.projection import response_sums
from ctpd_jax.models.compute import Compute, scored_logprobs
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params
from ctpd_jax.schema import CHOSEN, REJECTED, Array, Batch

Sums = dict[str, jax.Array]  # name -> float32 [2]: sum and count


@dataclass(frozen=True)
class Objective:
    """What a preference stage minimises; see core.losses.preference_loss."""

    beta: float
    label_smoothing: float = 0.0
    loss: str = "sigmoid"
    sft_weight: float = 0.0
    preference: bool = True  # without, the spans' regression is all of it
    regression: float = 0.0  # of core.objectives.response_errors, both responses


def response_ids(batch: Batch) -> Array:
    """Returns the place of each slot's response among [P, 2], flattened: int32 [R, K], -1 in padding."""
    return jnp.where(batch.pair >= 0, 2 * batch.pair + batch.side, -1)


def preference_sums(
    config: DecoderConfig, objective: Objective, compute: Compute, params: Params, batch: Batch
) -> tuple[Array, Sums]:
    """Returns the summed loss of the batch's pairs, and the sums that are logged.

    The return of a response is sum_t w_t log pi(y_t) - c: the token form of arXiv 2601.11865's return,
    which is what keeps the teacher out of the training job.
    """
    # 1. What the policy gives each scored token, and which response that token belongs to.
    logps = scored_logprobs(config, params, batch, compute)
    ids, shape = response_ids(batch), batch.constant.shape
    plain = response_sums(logps, ids, batch.constant.size).reshape(shape)  # [P, 2]
    counts = response_sums(jnp.ones_like(logps), ids, batch.constant.size).reshape(shape)

    # 2. The loss of each pair.
    returns = response_returns(logps, batch.weight, ids, batch.constant)
    out = preference_loss(
        returns[:, CHOSEN],
        returns[:, REJECTED],
        beta=objective.beta,
        label_smoothing=objective.label_smoothing if batch.label is None else 1 - batch.label,
        loss=objective.loss,
    )
    fluency = objective.sft_weight * sft_term(plain[:, CHOSEN], counts[:, CHOSEN])
    loss, errors = out.loss + fluency, None
    if batch.spans is not None:
        errors = response_errors(logps, batch.spans, ids, batch.constant.size).reshape(shape).mean(axis=1)
        loss = (loss if objective.preference else fluency) + objective.regression * errors
    if batch.pair_weight is not None:
        loss = batch.pair_weight * loss
    real = batch.real
    total = jnp.sum(loss * real)

    # 3. What is logged. Rewards with weights of one: annotated weights know the label, and a policy that has learnt
    # nothing would seem to agree with it.
    moved = objective.beta * (plain - batch.start)
    means = {
        "loss": loss,
        **reward_metrics("rewards/", *(objective.beta * (plain - batch.reference)).T),
        **reward_metrics("rewards/weighted_", out.chosen_rewards, out.rejected_rewards),
        "rewards/margin_from_start": moved[:, CHOSEN] - moved[:, REJECTED],
        "logps/chosen": plain[:, CHOSEN],
        "logps/rejected": plain[:, REJECTED],
    }
    if errors is not None:
        means["regression/error"] = errors
    pairs = jnp.sum(real)
    sums = {name: jnp.stack([jnp.sum(jnp.where(real > 0, value, 0.0)), pairs]) for name, value in means.items()}
    if objective.loss == "sigmoid" and objective.preference:  # else it is not the pair's weight in the gradient
        weights = out.lam - (objective.label_smoothing if batch.label is None else 1 - batch.label)
        sums |= {f"lambda/{name}": jnp.stack(part) for name, part in lambda_diagnostics(weights, real > 0).items()}
    return total, sums | token_sums(batch)


def sft_sums(config: DecoderConfig, compute: Compute, params: Params, batch: Batch) -> tuple[Array, Sums]:
    """Returns the summed negative log-likelihood of the scored tokens; its count is the number of tokens."""
    logps = scored_logprobs(config, params, batch, compute)
    total, count = sft_loss(logps, batch.weight)
    return total, {"loss": jnp.stack([total, count])} | token_sums(batch)


def token_sums(batch: Batch) -> Sums:
    """Tokens of the batch, scored tokens, and the share of the rows that is padding."""
    used = jnp.sum(batch.layout.segment > 0).astype(jnp.float32)
    one = jnp.ones((), jnp.float32)
    return {
        "num_tokens": jnp.stack([used, one * 0]),  # count 0: a total, not a mean
        "num_scored_tokens": jnp.stack([jnp.sum(batch.pair >= 0).astype(jnp.float32), one * 0]),
        "padding": jnp.stack([batch.tokens.size - used, one * batch.tokens.size]),
    }


def mean_of(sums: dict[str, Any]) -> dict[str, float]:
    """Divides once, at the very end; a count of zero marks a total."""
    return {name: float(part if count == 0 else part / count) for name, (part, count) in sums.items()}
