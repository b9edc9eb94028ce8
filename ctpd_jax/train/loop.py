"""One training stage from its first update to its last, resumable at every checkpoint.

Where the parameters of a stage come from, first match wins:
  1. its newest whole checkpoint: parameters, optimizer, step; the data follow from the step
  2. its beginning: the parameters handed in, a fresh optimizer, step 0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.errors import UserError
from ctpd_jax.processes import preempt
from ctpd_jax.schema import Batch
from ctpd_jax.sharding import make_mesh, place_batch, shard_shapes
from ctpd_jax.train.checkpoint import Checkpoints
from ctpd_jax.train.metrics import MetricLog, Progress
from ctpd_jax.train.optimizer import learning_rate, make_optimizer
from ctpd_jax.train.step import (
    Params,
    Sums,
    TrainState,
    add_sums,
    compiled_programs,
    init_state,
    make_steps,
    mean_of,
    state_shapes,
)


def train(
    name: str,
    directory: Path,
    settings: ConfigDict,
    steps: int,
    initial: Callable[[], Params],
    abstract: Params,
    sums_of: Callable[[Params, Batch], tuple[jax.Array, Sums]],
    batches: Callable[[int], list[Batch]],
    shapes: int,
    log: MetricLog,
    extra_metrics: dict[str, float] | None = None,
    log_every: int = 1,
    frozen: Params | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Runs updates 0..steps-1 of a stage and returns the final parameters, float32.

    `frozen` are parameters that belong to the model and are not trained: then `initial` and `abstract` are adapters.
    `sums_of` gives the summed loss and the sums that are logged; its "loss" entry's count is what the gradient is
    divided by. `batches(step)` are the micro-batches of an update, in `shapes` different shapes at most.
    `extra_metrics` stand in every line that is logged.
    Raises UserError where the loss or the gradient stops being finite, Preempted once the run was asked to stop and
    the update before is saved.
    """
    optimizer = make_optimizer(settings, steps)
    schedule = learning_rate(settings, steps)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]) if mesh is None else mesh
    placed = state_shapes(mesh, optimizer, shard_shapes(mesh, abstract))
    where = jax.tree.map(lambda leaf: leaf.sharding, placed)
    accumulate, update = make_steps(sums_of, optimizer, placed)
    begin = jax.jit(lambda params: init_state(params, optimizer), out_shardings=where)
    zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=where.params)
    with Checkpoints(directory, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(placed)
        state: TrainState = restored[1] if restored else begin(initial())
        first = int(state.step)
        log.rewind(name, first - 1)  # the line of step s tells of update s, counted from 0
        prepared = ahead(batches, first, steps)
        with Progress(steps, name, first, unit="update") as progress:
            if first < steps:
                progress.write(f"{name}: compiling, which can take minutes for a large model ...")
            for step in range(first, steps):
                if preempt.stop_now():
                    if step > first and step % settings.save_every:  # else it is there already
                        checkpoints.save(step, state, {"stage": name})
                    checkpoints.wait()
                    raise preempt.Preempted(f"saved after update {step} of {steps}" if step else "nothing to save yet")
                began = time.perf_counter()
                gradient = zeros(state.params)
                sums: dict = {}
                for batch in next(prepared):
                    gradient, new = accumulate(state.params, frozen or {}, gradient, place_batch(mesh, batch))
                    sums = add_sums(sums, new)
                state, norm = update(state, gradient, sums["loss"][1])
                metrics = mean_of(jax.device_get(sums))
                seconds = time.perf_counter() - began
                metrics |= {
                    "grad_norm": float(norm),
                    "lr": float(schedule(step)),
                    "seconds": seconds,
                    "tokens_per_second": metrics["num_tokens"] / seconds,
                    "compiled_programs": compiled_programs(name, accumulate, shapes),
                }
                if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"]):
                    raise UserError(
                        f"{name}: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at update {step}. "
                        f"Lower {name}.lr or look at the pairs of that update; its checkpoints are whole."
                    )
                if step % log_every == 0 or step == steps - 1:
                    log.log(name, step, metrics | (extra_metrics or {}))
                progress.update(1, loss=metrics["loss"])
                if (step + 1) % settings.save_every == 0 and step + 1 < steps:
                    checkpoints.save(step + 1, state, {"stage": name})
        checkpoints.wait()
    return state.params


def ahead(batches: Callable[[int], list[Batch]], first: int, steps: int) -> Iterator[list[Batch]]:
    """batches(first), ..., batches(steps - 1), each laid out while the devices are busy with the one before."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(batches, first)
        for step in range(first, steps):
            now = coming.result()
            if step + 1 < steps:
                coming = worker.submit(batches, step + 1)
            yield now
