"""One training stage from its first update to its last, resumable at every checkpoint.

Where the parameters of a stage come from, first match wins:
  1. its newest whole checkpoint: parameters, optimizer, step; the data follow from the step
  2. its beginning: the parameters handed in, a fresh optimizer, step 0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.data.loader import Updates
from ctpd_jax.errors import UserError
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params
from ctpd_jax.processes import preempt
from ctpd_jax.schema import Batch, Model
from ctpd_jax.sharding import place_batch
from ctpd_jax.train.checkpoint import Checkpoints
from ctpd_jax.train.metrics import MetricLog, Progress
from ctpd_jax.train.optimizer import learning_rate, make_optimizer
from ctpd_jax.train.step import (
    Sums,
    TrainState,
    add_sums,
    compiled_programs,
    init_state,
    make_steps,
    mean_of,
    state_shapes,
)


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
) -> Params:
    """Runs all updates of a stage and returns the final trainable parameters, float32.

    Args:
        recipe: what is executed; `initial()` and `frozen` are the arrays of its `trainable` and `frozen`.
        directory: of the checkpoints.
        updates: the micro-batches of every update.
        figures: they stand in every line that is logged.

    Raises:
        UserError: the loss or the gradient stops being finite.
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
    schedule = learning_rate(settings, steps)

    with Checkpoints(directory, keep=2) as checkpoints:
        # The newest checkpoint, or the beginning; lines of updates that a killed run had not saved are taken back.
        restored = checkpoints.restore_latest(placed)
        state: TrainState = restored[1] if restored else begin(require_shapes(name, recipe.trainable, initial()))
        first = int(state.step)
        log.rewind(name, first - 1)  # the line of step s tells of update s, counted from 0
        prepared = ahead(updates.batches, first, steps)
        with Progress(steps, name, first, unit="update") as progress:
            if first < steps:
                progress.write(f"{name}: compiling, which can take minutes for a large model ...")
            for step in range(first, steps):
                if preempt.stop_now():
                    if step > first and step % settings.save_every:  # else it is there already
                        checkpoints.save(step, state, {"stage": name})
                    checkpoints.wait()
                    raise preempt.Preempted(f"saved after update {step} of {steps}" if step else "nothing to save yet")

                # One update: sums over micro-batches, divided once, so that their number changes nothing.
                began = time.perf_counter()
                gradient = zeros(state.params)
                sums: dict = {}
                for batch in next(prepared):
                    gradient, new = accumulate(state.params, frozen, gradient, place_batch(mesh, batch))
                    sums = add_sums(sums, new)
                state, norm = update(state, gradient, sums["loss"][1])

                # What it did. Fetching the sums waits for the devices, so the seconds are those of the whole update.
                metrics = mean_of(jax.device_get(sums))
                seconds = time.perf_counter() - began
                metrics |= {
                    "grad_norm": float(norm),
                    "lr": float(schedule(step)),
                    "seconds": seconds,
                    "tokens_per_second": metrics["num_tokens"] / seconds,
                    "compiled_programs": compiled_programs(name, accumulate, len(updates.shapes)),
                }
                if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"]):
                    raise UserError(
                        f"{name}: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at update {step}. "
                        f"Lower {name}.lr or look at the pairs of that update; its checkpoints are whole."
                    )
                if step % log_every == 0 or step == steps - 1:
                    log.log(name, step, metrics | dict(figures or {}))
                progress.update(1, loss=metrics["loss"])
                if (step + 1) % settings.save_every == 0 and step + 1 < steps:
                    checkpoints.save(step + 1, state, {"stage": name})
        checkpoints.wait()
    return state.params


def require_shapes(name: str, expected: Params, found: Params) -> Params:
    """Returns `found`.

    Raises:
        RuntimeError: parameters are not what the recipe says, so that another program would run than was planned.
    """

    def described(leaf: Any) -> tuple:
        return leaf.shape, leaf.dtype

    told, there = jax.tree.map(described, expected), jax.tree.map(described, found)
    if told != there:
        raise RuntimeError(f"{name}: the parameters are not those of its recipe; please report this.")
    return found


def ahead(batches: Callable[[int], list[Batch]], first: int, steps: int) -> Iterator[list[Batch]]:
    """batches(first), ..., batches(steps - 1), each laid out while the devices are busy with the one before."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(batches, first)
        for step in range(first, steps):
            now = coming.result()
            if step + 1 < steps:
                coming = worker.submit(batches, step + 1)
            yield now
