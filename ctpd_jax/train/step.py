"""The jitted steps: one micro-batch adds to the gradient, one update spends it.

Letters: R rows, L row length, K scored tokens of a row, D model width, V vocabulary, P pairs.

Every number is a pair (sum, count) until it is logged, so that neither the split into micro-batches nor the devices
change it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ctpd_jax.core.logprobs import BLOCK_BYTES, token_logprobs
from ctpd_jax.core.losses import Link, lambda_diagnostics, preference_loss, sft_loss
from ctpd_jax.models.attention_backends import Backend
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Remat, hidden_states, unembedding
from ctpd_jax.models.lora import join
from ctpd_jax.schema import CHOSEN, REJECTED, Array, Batch
from ctpd_jax.sharding import ROWS, constrain, replicated

Params = Any
Sums = dict[str, jax.Array]  # name -> float32 [2]: sum and count


@dataclass(frozen=True)
class Objective:
    """What a preference stage minimises; see core.losses.preference_loss."""

    beta: float
    label_smoothing: float = 0.0
    loss: Link = "sigmoid"
    sft_weight: float = 0.0


@dataclass(frozen=True)
class Compute:
    """How a model is run: the dtype of its products, what is kept for the backward pass, how it attends, and where."""

    dtype: str = "float32"
    remat: Remat = "dots"
    attention: Backend = "plain"
    mesh: Mesh | None = None


class TrainState(NamedTuple):
    """Everything that a resumed run needs besides its settings; `step` counts finished updates."""

    step: Array  # int32 []
    params: Params  # float32
    opt_state: Any


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shapes(mesh: Mesh, optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """The state of parameters given as jax.ShapeDtypeStruct with shardings; their moments lie as they do."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), params)

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param: placed(leaf, param.sharding),
        shapes.opt_state,
        params,
        transform_non_params=lambda leaf: placed(leaf, replicated(mesh)),
    )
    return TrainState(placed(shapes.step, replicated(mesh)), params, opt_state)


def scored_logprobs(config: DecoderConfig, params: Params, batch: Batch, compute: Compute) -> Array:
    """Returns log pi(target | everything before) of each scored slot: float32 [R, K], 0 in padding."""
    mesh, dtype = compute.mesh, jnp.dtype(compute.dtype)
    hidden = hidden_states(config, params, batch.tokens, batch.layout, compute.remat, dtype, compute.attention, mesh)
    scored = jnp.take_along_axis(hidden, batch.predictor[..., None], axis=1)  # [R, K, D]
    head = unembedding(config, params).astype(scored.dtype)
    # The block of logits is spread over the devices, so that each may have one of the usual size.
    chunk = max(1, BLOCK_BYTES // (4 * config.vocab_size)) * (1 if mesh is None else mesh.devices.size)
    logps = token_logprobs(constrain(mesh, scored, ROWS, None, None), head, batch.target, chunk, config.final_softcap)
    return jnp.where(batch.pair >= 0, logps, 0.0)


def per_response(values: Array, batch: Batch) -> Array:
    """Sums slot values [R, K] into their responses: [P, 2], chosen and rejected.

    This is core.losses.response_return where a batch's responses lie in rows of any layout.
    """
    pairs = batch.real.shape[0]
    place = jnp.where(batch.pair >= 0, 2 * batch.pair + batch.side, 2 * pairs)  # padding falls into one slot too many
    return jax.ops.segment_sum(values.ravel(), place.ravel(), 2 * pairs + 1)[:-1].reshape(pairs, 2)


def preference_sums(
    config: DecoderConfig, objective: Objective, compute: Compute, params: Params, batch: Batch
) -> tuple[Array, Sums]:
    """Returns the summed loss of the batch's pairs, and the sums that are logged.

    The return of a response is sum_t w_t log pi(y_t) - c: the identity of section 2 of the method (arXiv 2601.11865),
    which is what keeps the teacher out of the training job.
    """
    logps = scored_logprobs(config, params, batch, compute)
    weighted = per_response(logps * batch.weight, batch)
    plain = per_response(logps, batch)
    counts = per_response(jnp.ones_like(logps), batch)
    returns = weighted - batch.constant
    out = preference_loss(
        returns[:, CHOSEN],
        returns[:, REJECTED],
        beta=objective.beta,
        label_smoothing=objective.label_smoothing,
        loss=objective.loss,
    )
    nll = -plain[:, CHOSEN] / jnp.maximum(counts[:, CHOSEN], 1)
    real = batch.real
    total = jnp.sum((out.loss + objective.sft_weight * nll) * real)

    pairs = jnp.sum(real)
    moved = objective.beta * (plain - batch.start)
    # With weights of one: annotated ones know the label, and a policy that has learnt nothing would seem to agree.
    means = {
        "loss": out.loss + objective.sft_weight * nll,
        **reward_metrics("rewards/", *(objective.beta * (plain - batch.reference)).T),
        **reward_metrics("rewards/weighted_", out.chosen_rewards, out.rejected_rewards),
        "rewards/margin_from_start": moved[:, CHOSEN] - moved[:, REJECTED],
        "logps/chosen": plain[:, CHOSEN],
        "logps/rejected": plain[:, REJECTED],
    }
    sums = {name: jnp.stack([jnp.sum(jnp.where(real > 0, value, 0.0)), pairs]) for name, value in means.items()}
    if objective.loss == "sigmoid":  # of the other links it is not the pair's weight in the gradient
        weights = out.lam - objective.label_smoothing
        sums |= {f"lambda/{name}": jnp.stack(part) for name, part in lambda_diagnostics(weights, real > 0).items()}
    return total, sums | token_sums(batch)


def reward_metrics(prefix: str, chosen: Array, rejected: Array) -> dict[str, Array]:
    """What is logged of the rewards of pairs, each [P]; ties count one half."""
    margin = chosen - rejected
    return {
        f"{prefix}chosen": chosen,
        f"{prefix}rejected": rejected,
        f"{prefix}margins": margin,
        f"{prefix}accuracies": (margin > 0) + 0.5 * (margin == 0),
    }


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


def make_steps(
    sums_of: Callable[[Params, Batch], tuple[Array, Sums]],
    optimizer: optax.GradientTransformation,
    placed: TrainState | None = None,
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Returns (accumulate, update). `placed`, from `state_shapes`, says where the state lies, and gradients with it.

    accumulate(params, frozen, gradient, batch) -> (gradient + this batch's, sums); the gradient's buffer is reused.
    `frozen` are parameters that are not trained: the base under adapters, or {}.
    update(state, gradient, count) -> (state, norm of gradient / count before clipping); the state's buffers are reused.
    """

    of_state = None if placed is None else jax.tree.map(lambda leaf: leaf.sharding, placed)
    of_params = None if of_state is None else of_state.params
    of_sums = None if placed is None else placed.step.sharding  # whole everywhere

    @partial(jax.jit, donate_argnums=(2,), out_shardings=(of_params, of_sums))
    def accumulate(params: Params, frozen: Params, gradient: Params, batch: Batch) -> tuple[Params, Sums]:
        def sums_with(params: Params) -> tuple[Array, Sums]:
            return sums_of(join(frozen, params), batch)

        (_, sums), new = jax.value_and_grad(sums_with, has_aux=True)(params)
        return jax.tree.map(jnp.add, gradient, new), sums

    @partial(jax.jit, donate_argnums=(0,), out_shardings=(of_state, of_sums))
    def update(state: TrainState, gradient: Params, count: Array) -> tuple[TrainState, Array]:
        mean = jax.tree.map(lambda g: g / count, gradient)
        changes, opt_state = optimizer.update(mean, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        return TrainState(state.step + 1, params, opt_state), optax.global_norm(mean)

    return accumulate, update


def compiled_programs(stage: str, program: Any, shapes: int) -> int:
    """How many programs a jitted function was compiled to, one for each shape of its batches.

    Raises:
        RuntimeError: they are more than the shapes that were planned; a run would spend its time on compiling.
    """
    count = program._cache_size()
    if count > shapes:
        raise RuntimeError(
            f"{stage}: {count} programs were compiled for batches of {shapes} planned shapes, so something else than "
            "their shape changes between calls: a dtype, a sharding, or the structure of the parameters."
        )
    return count


def add_sums(total: dict[str, Any], new: Sums) -> dict[str, Any]:
    return {name: value + total.get(name, 0.0) for name, value in new.items()}


def mean_of(sums: dict[str, Any]) -> dict[str, float]:
    """Divides once, at the very end; a count of zero marks a total."""
    return {name: float(part if count == 0 else part / count) for name, (part, count) in sums.items()}
