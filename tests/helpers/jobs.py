"""Jobs without a command: what a test asks of a workdir that commands have filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from ctpd_jax.job.held import Held
from ctpd_jax.job.job import Job, meshes
from ctpd_jax.job.lineage import Files, with_adapters
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.train.checkpoint import CHECKSUMS, load_params
from ctpd_jax.train.metrics import MetricLog


def job_in(workdir: Path, config: ConfigDict) -> Job:
    """A job on this process's devices; it says nothing and logs nothing to TensorBoard."""
    return Job(config, workdir, MetricLog(workdir, tensorboard=False), lambda text: None, *meshes(config), Held(0.0))


def files_of(job: Job) -> Files:
    """The parameters that the job's stages left."""
    return Files(job, job.mesh)


def adapted(job: Job, stage: str, model: str) -> DecoderConfig:
    """The model's config with the adapters that a stage trains."""
    return with_adapters(job.config, stage, files_of(job).decoder(model))


def stored_params(folder: Path) -> Any:
    """What a stage left in its folder `params`, as it lies there: a nested dict of NumPy arrays."""
    stored = json.loads((folder / CHECKSUMS).read_text())["leaves"]
    empty = {name: np.empty(shape, np.dtype(dtype)) for name, (shape, dtype) in stored.items()}
    return load_params(folder, ocp.tree.from_flat_dict(empty, sep="/"))


def dtypes(tree: object) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
