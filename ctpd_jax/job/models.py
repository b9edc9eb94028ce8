"""The two models of a job as the user gave them: folder, decoder, tokenizer and template, and what identifies them."""

from __future__ import annotations

import contextlib
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.artifacts import Broken, read_record, sha256_file
from ctpd_jax.errors import UserError
from ctpd_jax.job.job import Job
from ctpd_jax.job.table import models_here
from ctpd_jax.models.attention_backends import choose_backend, platform_of, usual_dtype
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.hf import model_directory
from ctpd_jax.models.hf.config import read_config
from ctpd_jax.schema import MODELS, Model
from ctpd_jax.sharding import check_heads
from ctpd_jax.text.parallel import Source
from ctpd_jax.text.prompts import TextModel, load_text_model


@lru_cache(maxsize=8)  # a hub is asked once
def folder(job: Job, model: Model) -> Path:
    """The model's folder, downloaded where that is needed."""
    path = job.config[model].path
    if not path:
        raise UserError(f"config.{model}.path is empty; give a folder in Hugging Face format or a hub id.")
    return model_directory(path, weights=model in models_here(job.config))


@lru_cache(maxsize=8)
def decoder_of(job: Job, model: Model) -> DecoderConfig:
    """The model's config."""
    return read_config(folder(job, model))


@lru_cache(maxsize=8)  # probing a tokenizer takes a second
def text_of(job: Job, model: Model) -> TextModel:
    """The model's tokenizer and template, probed."""
    return load_text_model(*source_of(job, model))


def source_of(job: Job, model: Model) -> Source:
    """Where the model's tokenizer and template come from."""
    settings = job.config[model]
    return Source(str(folder(job, model)), settings.template, settings.template_variables)


def weights_digest(job: Job, model: Model) -> str:
    """SHA-256 over the model's files; remembered in the workdir for as long as sizes and times stay."""
    # Hashing a large model takes minutes; size and time of each file say whether that was done before.
    where = folder(job, model)
    files = sorted([*where.glob("*.safetensors"), where / "config.json"])
    key = "|".join(f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
    known: dict[str, Any] = {}
    with contextlib.suppress(Broken):
        known = read_record(job.workdir / "models.json") or {}
    if known.get(model, {}).get("files") != key:
        joined = "".join(sha256_file(file) for file in files)
        known[model] = {"files": key, "weights": hashlib.sha256(joined.encode()).hexdigest()}
        job.note("models.json", known)
    return known[model]["weights"]


def text_digest(job: Job, model: Model) -> dict[str, Any]:
    """What identifies a model's text side: SHA-256 of its tokenizer and of its template, and what ends a turn."""
    text = text_of(job, model)
    return {
        "tokenizer": text.tokenizer.fingerprint,
        "template": text.template.fingerprint,
        "end_of_turn": text.end_of_turn,
    }


def check_sizes(job: Job) -> None:
    """Refuses swapped folders: a teacher with fewer parameters than its student is seldom meant."""
    if "teacher" not in models_here(job.config):
        return
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(param_shapes(decoder_of(job, name)))) for name in MODELS}
    if sizes["teacher"] < sizes["student"] and not job.config.smaller_teacher:
        raise UserError(
            f"The teacher {folder(job, 'teacher')} has {sizes['teacher']:,} parameters, the student "
            f"{folder(job, 'student')} {sizes['student']:,}: are they swapped? If not, --config.smaller_teacher=True."
        )


def dtype_of(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> str:
    """The dtype of the products of every model on a mesh."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return usual_dtype(platform or platform_of(mesh.devices.flat[0]))


def layout_of(config: ConfigDict, platform: str) -> str:
    """How the responses of a pair lie in rows: a CPU reads a prompt once, the kernels of others like short units."""
    return config.rows.layout if config.rows.layout != "auto" else "shared" if platform == "cpu" else "response"


def compute_on(
    mesh: Mesh, config: ConfigDict, model: Model, decoder: DecoderConfig, platform: str | None = None
) -> Compute:
    """How a model is run on a mesh.

    Raises:
        UserError: config.attention cannot do what the model and its rows need, or its heads do not divide.
    """
    dtype, platform = dtype_of(config, mesh, platform), platform or platform_of(mesh.devices.flat[0])
    # A "shared" row lets two responses see one prompt, which not every attention back end can do.
    try:
        shared = layout_of(config, platform) == "shared"
        backend = choose_backend(config.attention, decoder, dtype, shared, platform)
    except UserError as error:
        raise UserError(f"The {model}: {error}") from error
    check_heads(mesh, decoder.num_heads, decoder.num_kv_heads, f"The {model}")
    remat = config[model].remat
    return Compute(dtype, remat if remat != "auto" else "dots" if platform == "cpu" else "full", backend, mesh)
