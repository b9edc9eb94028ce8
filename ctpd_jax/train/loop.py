"""One training stage: its loop, and its two jitted programs.

Where the parameters of a stage come from, first match wins:
  1. its newest whole checkpoint: parameters, optimizer, step; the data follow from the step
  2. its beginning: the parameters handed in, a fresh optimizer, step 0

An update whose loss or gradient is not finite ends the stage before anything of it is saved, or is left out where
`nonfinite` is "skip". Either way the pairs are named that are not finite by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.data.loader import Updates, ahead
from ctpd_jax.errors import UserError
from ctpd_jax.models.adding import add_gradient
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params
from ctpd_jax.models.lora import join
from ctpd_jax.processes import preempt
from ctpd_jax.schema import Array, Batch, Model
from ctpd_jax.sharding import compiler_options, place_batch, replicated, told_by_first
from ctpd_jax.train.checkpoint import Checkpoints
from ctpd_jax.train.held_out import HeldOut, Looks
from ctpd_jax.train.metrics import MetricLog, Progress
from ctpd_jax.train.optimizer import learning_rate, make_optimizer
from ctpd_jax.train.profile import PROFILE, traced
from ctpd_jax.train.sums import Sums, mean_of

TIMED = 5  # updates of a process before it says when to save: the first one compiles
MOST_IN_A_ROW = 5  # updates that are not finite end a stage also where they are left out: it has diverged


@dataclass(frozen=True)
class Recipe:
    """What a training stage executes. A run jits this and `ctpd plan` traces it: there is no second account of it."""

    stage: str
    model: Model
    settings: ConfigDict  # the stage's section of the config
    steps: int  # updates, from which the learning rate follows
    decoder: DecoderConfig  # with all adapters that run
    compute: Compute
    loss: Callable[[Params, Batch], tuple[jax.Array, Sums]]  # summed over the batch, and the sums that are logged
    trainable: Params  # jax.ShapeDtypeStruct with shardings; float32
    frozen: Params  # likewise: what lies under the adapters that are trained, else {}
    mesh: Mesh
    extra: tuple[str, ...] = ()  # optional fields of Batch that the loss reads

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.settings, self.steps)

    @property
    def state(self) -> TrainState:
        """The training state as shapes, placed."""
        return state_shapes(self.mesh, self.optimizer, self.trainable)

    def programs(self) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
        """The two jitted programs of an update; see `make_steps`."""
        return make_steps(self.loss, self.optimizer, self.state)


def train(
    recipe: Recipe,
    directory: Path,
    initial: Callable[[], Params],
    frozen: Params,
    updates: Updates,
    log: MetricLog,
    figures: Mapping[str, float] | None = None,
    log_every: int = 1,
    held_out: HeldOut | None = None,
    profile: range = range(0),
) -> Params:
    """Runs all updates of a stage and returns the final trainable parameters, float32; or those of its best update.

    Args:
        recipe: what is executed; `initial()` and `frozen` are the arrays of its `trainable` and `frozen`.
        directory: of the checkpoints.
        updates: the micro-batches of every update.
        figures: they stand in every line that is logged.
        held_out: what is looked at on the way; it changes nothing unless the best update is to be kept.
        profile: updates that are traced, beside the stage's folder.

    Raises:
        UserError: the loss or the gradient is not finite, and such updates are not to be left out.
        Preempted: the run was asked to stop, and the update before is saved.
    """
    name, settings, steps, mesh = recipe.stage, recipe.settings, recipe.steps, recipe.mesh
    require_shapes(name, recipe.frozen, frozen)

    # The programs: one adds a micro-batch to the gradient, one spends it; two small ones make the state and zeros.
    placed = recipe.state
    where = jax.tree.map(lambda leaf: leaf.sharding, placed)
    accumulate, update = recipe.programs()
    begin = jax.jit(lambda params: init_state(params, recipe.optimizer), out_shardings=where)
    zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=where.params)
    norm_of = jax.jit(optax.global_norm, out_shardings=where.step)
    pass_over = jax.jit(passed_over, out_shardings=where, donate_argnums=0)
    schedule = learning_rate(settings, steps)
    looks = Looks(held_out, mesh, steps, directory.with_name("best"))

    with Checkpoints(directory, keep=2) as checkpoints:
        # The newest checkpoint, or the beginning; lines of updates that a killed run had not saved are taken back.
        def at_hand() -> TrainState:
            return checkpoints.restore_latest(placed) or begin(require_shapes(name, recipe.trainable, initial()))

        state: Any = at_hand()
        first = int(state.step)
        log.rewind(name, first - 1)  # the line of step s tells of update s, counted from 0
        prepared = ahead(updates.batches, first, steps)
        saved, next_save = first, next_by_count(first, settings.save_every)
        began, in_a_row = 0.0, 0  # when the update before had ended; updates that were left out, up to it
        gradient: Any = zeros(state.params)
        with Progress(steps, name, first, unit="update") as progress:

            def blame(step: int, metrics: Mapping[str, float]) -> str:
                """Tell what of an update is not finite, and which of its pairs are not by themselves."""
                nonlocal state, gradient
                # Where the update was made its parameters are spoilt, and those of the last checkpoint are looked at.
                # Nothing is held twice, which might not fit.
                gradient = None
                if settings.nonfinite == "stop":
                    state = None
                    state = at_hand()
                # Each pair by itself, in the programs that there are.
                found = []
                for pair, batch in updates.alone(step):
                    alone, sums = accumulate(state.params, frozen, zeros(state.params), place_batch(mesh, batch))
                    if not np.isfinite(sums["loss"][0]) or not np.isfinite(norm_of(alone)):
                        found.append(pair)
                    del alone
                gradient = zeros(state.params)
                what = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at update {step}"
                return what + (f"; by themselves are not finite: {', '.join(found)}" if found else "")

            def tell(step: int, sums: Sums, norm: Array, programs: int, ended: float | None) -> None:
                """Log what an update did, which waits for it; where a look is due, `state` is still that update's."""
                nonlocal began, in_a_row
                metrics = mean_of(jax.device_get(sums))
                ended = ended or time.perf_counter()
                seconds, began = ended - began, ended
                metrics |= {
                    "grad_norm": float(norm),
                    "lr": float(schedule(step)),
                    "seconds": seconds,
                    "tokens_per_second": metrics["num_tokens"] / seconds,
                    "compiled_programs": programs,
                    **peak_memory(),
                }
                fine = np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
                in_a_row = 0 if fine else in_a_row + 1
                if not fine:
                    what = blame(step, metrics)
                    if settings.nonfinite == "stop" or in_a_row == MOST_IN_A_ROW:
                        raise UserError(
                            f"{name}: {what}. Lower {name}.lr, look at the pairs of that update, or leave such updates "
                            f"out, {MOST_IN_A_ROW - 1} in a row at most ({name}.nonfinite=skip). Its checkpoints are "
                            "whole."
                        )
                    progress.write(f"{name}: left out, {what}.")
                    metrics["skipped"] = 1
                if looks.due(step):
                    seen = mean_of(looks.at(step, state.params, frozen))
                    metrics |= {f"eval/{key}": value for key, value in seen.items()}
                if step % log_every == 0 or step == steps - 1 or looks.due(step) or not fine:
                    log.log(name, step, metrics | dict(figures or {}))
                beside: dict[str, float] = {k: v for k, v in metrics.items() if k in ("padding", "peak_memory_gb")}
                progress.update(1, beside, loss=metrics["loss"])

            if first < steps:
                progress.write(f"{name}: compiling, which can take minutes for a large model ...")
            untold, began = None, time.perf_counter()
            for step in traced(range(first, steps), profile, directory.parents[1] / PROFILE):
                if preempt.stop_now():
                    if untold:
                        tell(*untold)
                    if step > saved:
                        checkpoints.save(step, state)
                    checkpoints.wait()
                    raise preempt.Preempted(f"saved after update {step} of {steps}" if step else "nothing to save yet")

                # One update: sums over micro-batches, divided once, so that their number changes nothing.
                sums: Sums = {}
                for batch in next(prepared):
                    gradient, new = accumulate(state.params, frozen, gradient, place_batch(mesh, batch))
                    sums = {key: value + sums.get(key, 0.0) for key, value in new.items()}
                fine = True
                if settings.nonfinite == "skip":  # which has to wait for the devices
                    norm = norm_of(gradient)
                    fine = bool(np.isfinite(norm) and np.isfinite(sums["loss"][0]))
                if fine:
                    state, gradient, norm = update(state, gradient, sums["loss"][1])
                else:
                    state = pass_over(state)

                # It is told of while the next one runs, so that the devices do not wait for the host; but at once where
                # something is made of its parameters, which a loss that is not finite has to prevent.
                ended = time.perf_counter() if norm.is_ready() else None  # a CPU runs what is small at once
                if untold:
                    tell(*untold)
                untold = step, sums, norm, compiled_programs(name, accumulate, len(updates.shapes)), ended
                saves = step + 1 == next_save
                if saves or looks.due(step) or step + 1 == steps or not fine:
                    tell(*untold)
                    if saves and step + 1 < steps:
                        checkpoints.save(step + 1, state)
                    untold, began = None, time.perf_counter()
                if step == first:  # which has compiled
                    clock = time.perf_counter()
                if saves or step + 1 == first + TIMED:
                    saved = step + 1 if saves else saved
                    seconds = (time.perf_counter() - clock) / max(step - first, 1)
                    next_save = told_by_first(partial(save_after, step + 1, seconds, settings))
                if looks.over(step):
                    progress.write(f"{name}: ends after update {step + 1}, no look was better for so long.")
                    break
            params, what = looks.result(state.params)
            if what:
                progress.write(f"{name}: {what}.")
        checkpoints.wait()
    return params


def next_by_count(step: int, every: int) -> int:
    """Returns the next multiple of `every` updates."""
    return (step // every + 1) * every


def save_after(step: int, seconds: float, settings: ConfigDict) -> int:
    """Returns the update after which to save next: by count, or sooner by time, where one takes so many seconds."""
    by_count = next_by_count(step, settings.save_every)
    if not settings.save_minutes:
        return by_count
    return min(by_count, step + max(1, int(60 * settings.save_minutes / max(seconds, 1e-9))))


def require_shapes(name: str, expected: Params, found: Params) -> Params:
    """Returns `found`.

    Raises:
        RuntimeError: shapes or dtypes are not those of the recipe, so that another program would run than was planned.
    """

    def described(leaf: Any) -> tuple:
        return leaf.shape, leaf.dtype

    told, there = jax.tree.map(described, expected), jax.tree.map(described, found)
    if told != there:
        raise RuntimeError(f"{name}: the parameters are not those of its recipe; please report this.")
    return found


def peak_memory() -> dict[str, float]:
    """The most that the first device of this process has held so far, GB; {} where it does not say, as a CPU."""
    found = jax.local_devices()[0].memory_stats() or {}
    return {"peak_memory_gb": found["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in found else {}


# ------------------------------------------------------------------------------------------------ programs


class TrainState(NamedTuple):
    """Everything that a resumed run needs besides its settings; `step` counts finished updates."""

    step: Array  # int32 []
    params: Params  # float32
    opt_state: Any


def passed_over(state: TrainState) -> TrainState:
    """The state after an update that was left out: its counters go on, the learning rate's too."""
    return jax.tree.map(lambda leaf: leaf + jnp.issubdtype(leaf.dtype, jnp.integer), state)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shapes(mesh: Mesh, optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """The state of parameters given as jax.ShapeDtypeStruct with shardings; their moments lie as they do."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), params)

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # Moments lie where their parameters do; counters are whole everywhere.
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param: placed(leaf, param.sharding),
        shapes.opt_state,
        params,
        transform_non_params=lambda leaf: placed(leaf, replicated(mesh)),
    )
    return TrainState(placed(shapes.step, replicated(mesh)), params, opt_state)


def make_steps(
    loss: Callable[[Params, Batch], tuple[Array, Sums]],
    optimizer: optax.GradientTransformation,
    placed: TrainState,
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Returns (accumulate, update). `placed`, from `state_shapes`, says where the state lies, and gradients with it.

    accumulate(params, frozen, gradient, batch) -> (gradient + this batch's, sums); the gradient's buffer is reused.
    `frozen` are parameters that are not trained: the base under adapters, or {}.
    update(state, gradient, count) -> (state, a gradient of zeros, norm of gradient / count before clipping). The
    buffers of state and gradient are reused: an update that is enqueued behind another one takes no more memory.
    """

    # Where results lie is said for both programs: left to the compiler, the state could wander between updates.
    of_state = jax.tree.map(lambda leaf: leaf.sharding, placed)
    of_sums = placed.step.sharding  # whole everywhere
    options = compiler_options(of_sums.mesh)

    @partial(jax.jit, donate_argnums=(2,), out_shardings=(of_state.params, of_sums), compiler_options=options)
    def accumulate(params: Params, frozen: Params, gradient: Params, batch: Batch) -> tuple[Params, Sums]:
        whole = "layers" in params.get("model", {}) and "model" not in frozen  # else adapters, which are small
        return add_gradient(lambda params: loss(join(frozen, params), batch), params, gradient, layers=whole)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(of_state, of_state.params, of_sums))
    def update(state: TrainState, gradient: Params, count: Array) -> tuple[TrainState, Params, Array]:
        mean = jax.tree.map(lambda g: g / count, gradient)
        changes, opt_state = optimizer.update(mean, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        cleared = jax.tree.map(jnp.zeros_like, gradient)
        return TrainState(state.step + 1, params, opt_state), cleared, optax.global_norm(mean)

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
