"""Held-out pairs while a stage trains: they are read every so many updates, and the best update can be what is left.

It is a function of the parameters alone: a run that was killed and goes on sees the same numbers, keeps the same update
and stops at the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ctpd_jax.models.decoder import Params
from ctpd_jax.models.lora import join
from ctpd_jax.schema import Array, Batch
from ctpd_jax.settings import LESS_IS_BETTER
from ctpd_jax.sharding import barrier, compiler_options, place_batch, replicated
from ctpd_jax.train.checkpoint import abstract, load_params, read_meta, save_params


@dataclass(frozen=True)
class HeldOut:
    """What is looked at, and what follows from it."""

    batches: Sequence[Batch]
    sums: Callable[[Params, Batch], tuple[Array, dict[str, Array]]]  # as a recipe's loss
    every: int  # updates
    keep_best: str = ""  # one of settings.MEASURES; "": the last update is what is left
    patience: int = 0  # looks without a better one after which the stage ends; 0: it never does


class Looks:
    """The looks of one stage. Without `held_out` there are none."""

    def __init__(self, held_out: HeldOut | None, mesh: Mesh, steps: int, folder: Path) -> None:
        self._of, self._mesh, self._steps, self._folder = held_out, mesh, steps, folder
        self._best: dict[str, Any] = {}  # step and value of the best one
        if held_out is not None:
            self._program = jax.jit(
                lambda params, frozen, batch: held_out.sums(join(frozen, params), batch)[1],
                out_shardings=replicated(mesh),
                compiler_options=compiler_options(mesh),
            )
            if held_out.keep_best:
                self._best = read_meta(folder) or {}

    def due(self, step: int) -> bool:
        """Whether the parameters after update `step`, counted from 0, are looked at: every so often, and at the end."""
        return self._of is not None and ((step + 1) % self._of.every == 0 or step + 1 == self._steps)

    def at(self, step: int, params: Params, frozen: Params) -> dict[str, Array]:
        """Return the sums over the held-out pairs, and keep the parameters if they are the best so far."""
        assert self._of is not None
        sums: dict[str, Array] = {}
        for batch in self._of.batches:
            new = self._program(params, frozen, place_batch(self._mesh, batch))
            sums = {name: value + sums.get(name, 0.0) for name, value in new.items()}
        sums = jax.device_get(sums)
        if measure := self._of.keep_best:
            total, count = sums[measure]
            value = float(total / count) * (-1 if measure in LESS_IS_BETTER else 1)
            # An equal one later is not better: what a killed run kept is met again and stays. Nothing is better than a
            # number that is none, or worse.
            if math.isfinite(value) and (not self._best or value > self._best["value"]):
                self._best = {"step": step, "value": value}
                save_params(self._folder, params, self._best)
        return sums

    def over(self, step: int) -> bool:
        """Whether the stage ends here, because it has not become better for so long."""
        if self._of is None or not self._of.patience or not self._best or not self.due(step):
            return False
        return step - self._best["step"] >= self._of.patience * self._of.every

    def result(self, params: Params) -> tuple[Params, str]:
        """Return what the stage leaves, and a sentence where that is not the last update."""
        if not self._best:
            return params, ""
        barrier("the best update is kept")
        advice = f"Remove {self._folder}: the stage then leaves its last update, or the best one that is still to come."
        best = load_params(self._folder, abstract(params), advice=advice)
        measure = self._of.keep_best if self._of else ""
        value = abs(self._best["value"]) if measure in LESS_IS_BETTER else self._best["value"]
        update = self._best["step"] + 1
        return best, f"the best {measure} of the held-out pairs, {value:.4g}, was that of update {update}"
