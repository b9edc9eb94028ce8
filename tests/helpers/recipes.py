"""Recipes of training stages without a job, for tests of the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.data.loader import Updates
from ctpd_jax.models.compute import Compute
from ctpd_jax.sharding import make_mesh, shard_shapes
from ctpd_jax.train.loop import Recipe


def recipe_of(
    loss: Callable, trainable: Any, settings: ConfigDict, steps: int, frozen: Any = None, mesh: Mesh | None = None,
    stage: str = "stage",
) -> Recipe:  # fmt: skip
    """What `train` executes for a loss and the shapes of its parameters; on one device where no mesh is given."""
    mesh = mesh or make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    placed = shard_shapes(mesh, trainable), shard_shapes(mesh, frozen or {})
    return Recipe(stage, "student", settings, steps, None, Compute(mesh=mesh), loss, *placed, mesh)  # type: ignore[arg-type]


def updates_of(batches: Callable, shapes: int) -> Updates:
    """Batches of a number of planned shapes, whatever those are."""
    return Updates(batches, lambda step: (), 1, (None,) * shapes, 0.0)  # type: ignore[arg-type]
