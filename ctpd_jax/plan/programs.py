"""The programs of a stage, traced from shapes alone: no weights, no data.

Letters: R rows, L row length, K scored tokens of a row, P pairs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ctpd_jax.annotate.teacher import make_scorer
from ctpd_jax.data.loader import padding, plan_shapes
from ctpd_jax.data.packing import PackingConfig as Rows
from ctpd_jax.data.packing import round_up
from ctpd_jax.data.rows import BatchShape, PairItem, ScoredResponse
from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.families import FAMILIES
from ctpd_jax.models.hf_config import from_hf, read_config
from ctpd_jax.models.lora import adapter_shapes, beside, join, with_lora
from ctpd_jax.run import compute_on
from ctpd_jax.schema import Batch, Model, RowLayout
from ctpd_jax.settings import TRAINED, base_dtype, learns_responses, left_out, sft_stays_apart, trained_model
from ctpd_jax.sharding import ROWS, replicated, row_devices, shard_shapes
from ctpd_jax.toy.models import make_toy_models
from ctpd_jax.train.optimizer import make_optimizer
from ctpd_jax.train.step import Compute, Objective, make_steps, preference_sums, sft_sums, state_shapes

STAGES = (*TRAINED, "annotate")
KNOWN_MODELS = Path(__file__).with_name("known_models.json")


Bases = Mapping[Model, DecoderConfig]


@dataclass(frozen=True)
class Program:
    """A jitted function with the shapes that it is called with, and what lies in memory meanwhile."""

    name: str
    traced: Any  # jax.stages.Traced
    times: int  # calls per update, or per batch of an annotation
    memory: Mapping[str, float]  # bytes on one device, by what they are
    beside: float  # of those, what is not among the arguments
    decoder: DecoderConfig
    compute: Compute
    parameters: int  # of the whole model, adapters left out
    trained: int

    @property
    def training(self) -> bool:
        return self.trained > 0


@dataclass(frozen=True)
class Stage:
    """What one stage runs, and on what."""

    name: str
    model: Model  # the one that is trained, or the largest that reads
    mesh: Mesh
    pairs: int  # of an update, or of a batch of an annotation (SFT: responses)
    micro_batch: int
    shape: BatchShape  # of a micro-batch
    programs: tuple[Program, ...]


# ------------------------------------------------------------------------------------------------ models


def decoders(config: ConfigDict, stage: str) -> dict[Model, DecoderConfig]:
    """The configs of the models that a stage runs."""
    models = {model for _, model, _ in passes(config)} if stage == "annotate" else {trained_model(config, stage)}
    return {model: decoder_of(config, model) for model in models}


def decoder_of(config: ConfigDict, model: Model) -> DecoderConfig:
    """The model's config: of a folder, of a model that is known here, or fetched from the hub (config.json alone).

    Raises:
        UserError: the path is none of them.
    """
    path = config[model].path
    if config.data.train == "toy" and not path:
        with tempfile.TemporaryDirectory() as made:
            return read_config(make_toy_models(made, config.seed)[("teacher", "student").index(model)])
    if not path:
        raise UserError(f"config.{model}.path is empty; give a folder with a config.json, or a hub id.")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return read_config(folder)
    known = json.loads(KNOWN_MODELS.read_text(encoding="utf-8"))
    if path in known:
        return from_hf(known[path], where=path)
    from huggingface_hub import hf_hub_download

    try:
        return read_config(Path(hf_hub_download(path, "config.json")).parent)
    except UserError:
        raise
    except Exception as error:  # the hub client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"config.{model}.path is {path}: no folder, not among the models that are known without the hub "
            f"({', '.join(known)}), and its config.json could not be fetched ({reason})."
        ) from error


def share(decoder: DecoderConfig, tensor: int) -> DecoderConfig:
    """One device's part of a model that `tensor` devices share: its heads, its MLP width, its vocabulary."""
    return replace(
        decoder,
        num_heads=decoder.num_heads // tensor,
        num_kv_heads=decoder.num_kv_heads // tensor,
        intermediate_size=decoder.intermediate_size // tensor,
        vocab_size=decoder.vocab_size // tensor,
    )


# ------------------------------------------------------------------------------------------------ shapes


def largest_shape(config: ConfigDict, pairs: int, responses: int, devices: int) -> BatchShape:
    """The shape that takes any micro-batch of `pairs`, all prompts and responses being as long as they may be.

    Packed rows of real data are fewer: few responses are of full length.
    """
    prompt, response, rows = config.data.max_prompt_tokens, config.data.max_response_tokens, config.rows
    together = rows.layout != "response"
    prompts = responses if rows.layout == "pair" else 1
    tokens = prompts * prompt + responses * response if together else prompt + response
    scored = responses * response if together else response
    length = rows.length or int(round_up(tokens, rows.multiple))
    if tokens > length:
        raise UserError(
            f"config.rows.length is {length}, but a row has to take up to {tokens} tokens at once: raise it, set it to "
            "0, or lower config.data.max_prompt_tokens or config.data.max_response_tokens."
        )
    room = length // tokens if rows.packed != "no" else 1  # units of a row
    units = pairs if together else pairs * responses
    # Of packed rows, several units with short prompts may fill one.
    slots = length if rows.packed != "no" else min(length, int(round_up(scored, rows.multiple)))
    return BatchShape(int(round_up(-(-units // room), devices)), length, slots)


def usual_padding(config: ConfigDict, name: str, mesh: Mesh) -> float:
    """The share of padding, were lengths spread evenly from a fifth of what `config.data` allows to all of it.

    About what UltraFeedback has; a plan sees no data.
    """
    settings, sft = config[name], name != "annotate" and learns_responses(config, name)
    part = settings.pairs_per_shard if name == "annotate" else settings.batch_size
    lengths = np.random.default_rng(0).uniform(0.2, 1.0, (max(256, part) // part * part, 3))
    limits = np.array([config.data.max_prompt_tokens, *[config.data.max_response_tokens] * 2])

    def item(prompt: int, *responses: int) -> PairItem:
        chosen, rejected = (ScoredResponse(np.zeros(n, np.int32), np.zeros(n, np.float32)) for n in responses)
        return PairItem(np.zeros(prompt, np.int32), chosen, None if sft else rejected)

    items = [item(*row) for row in np.ceil(lengths * limits).astype(int).tolist()]
    rows = Rows(**config.rows.to_dict() | {"packed": config.rows.packed != "no"}, row_multiple=row_devices(mesh))
    parts = np.arange(len(items)).reshape(-1, part)
    micro_batch = min(settings.micro_batch, part)
    return padding(items, parts, micro_batch, rows, plan_shapes(items, parts, micro_batch, rows))


def abstract_batch(mesh: Mesh, shape: BatchShape, pairs: int) -> Batch:
    """A batch as jax.ShapeDtypeStruct, placed as `sharding.place_batch` places it."""
    by_row, whole = NamedSharding(mesh, P(ROWS)), replicated(mesh)

    def array(size: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=where)

    row = array((shape.rows, shape.length), jnp.int32, by_row)
    slot = array((shape.rows, shape.scored), jnp.int32, by_row)
    weight = array((shape.rows, shape.scored), jnp.float32, by_row)
    both, one = array((pairs, 2), jnp.float32, whole), array((pairs,), jnp.float32, whole)
    return Batch(row, RowLayout(row, row, row), slot, slot, slot, slot, weight, both, both, both, one)


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of placed shapes on one device."""
    return float(
        sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    )


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------------------ programs


def plan_stage(
    config: ConfigDict, name: str, bases: Bases, mesh: Mesh, shape: BatchShape | None = None, platform: str = "tpu"
) -> Stage:
    """Traces the programs of a stage, for micro-batches of `shape` or of the largest that can come.

    Raises:
        UserError: where the run itself would refuse.
    """
    if name == "annotate":
        return annotation(config, bases, mesh, platform, shape)
    return training(config, name, bases, mesh, platform, shape)


def training(config: ConfigDict, name: str, bases: Bases, mesh: Mesh, platform: str, shape: BatchShape | None) -> Stage:
    """The two programs of an update: see `train.step.make_steps`."""
    model = trained_model(config, name)
    base = bases[model]
    compute = compute_on(mesh, config, model, base, platform)
    settings, sft = config[name], learns_responses(config, name)
    if not FAMILIES[base.family].trainable:
        raise UserError(f"{name}: the {model} is a mixture of experts; those can score, but are not trained.")
    lora = settings.lora
    decoder = with_lora(base, lora.rank, lora.alpha, lora.targets) if lora.rank else base
    params, frozen = shard_shapes(mesh, param_shapes(base)), {}
    if lora.rank:
        params = shard_shapes(mesh, adapter_shapes(decoder))
        frozen = shard_shapes(mesh, param_shapes(base, jnp.dtype(lora.base)))
        if not name.endswith("_sft"):
            decoder, frozen = after_sft(config, model, lora.base, decoder, frozen, mesh)
    if sft:
        sums_of: Any = partial(sft_sums, decoder, compute)
    else:
        objective = Objective(settings.beta, settings.label_smoothing, settings.loss, settings.sft_weight)
        sums_of = partial(preference_sums, decoder, objective, compute)
    optimizer = make_optimizer(settings, 100)
    state = state_shapes(mesh, optimizer, params)
    accumulate, update = make_steps(sums_of, optimizer, state)

    micro_batch = min(settings.micro_batch, settings.batch_size)
    shape = shape or largest_shape(config, micro_batch, 1 if sft else 2, row_devices(mesh))
    batch = abstract_batch(mesh, shape, micro_batch)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    memory = {
        "parameters": device_bytes(params) + device_bytes(frozen),
        "optimizer": device_bytes(state.opt_state),
        "gradient": device_bytes(params),
        "batch": device_bytes(batch),
    }
    of_model = (decoder, compute, count(param_shapes(base)), count(params))
    micro_batches = -(-settings.batch_size // micro_batch)
    traced = accumulate.trace(params, frozen, params, batch), update.trace(state, params, scalar)
    programs = (
        Program("accumulate", traced[0], micro_batches, memory, memory["optimizer"], *of_model),
        Program("update", traced[1], 1, memory | {"batch": 0.0}, device_bytes(frozen), *of_model),
    )
    return Stage(name, model, mesh, settings.batch_size, micro_batch, shape, programs)


def after_sft(
    config: ConfigDict, model: Model, dtype: str, decoder: DecoderConfig, base: Any, mesh: Mesh
) -> tuple[DecoderConfig, Any]:
    """What is read or trained, with the adapters of the model's SFT where they stay beside it: see `Run.start`."""
    if not sft_stays_apart(config, model, dtype):
        return decoder, base
    lora = config[f"{model}_sft"].lora
    sft = with_lora(decoder, lora.rank, lora.alpha, lora.targets)
    assert sft.lora is not None
    joined = join(base, shard_shapes(mesh, adapter_shapes(sft)))
    return sft if decoder.lora is None else beside(decoder, sft.lora), joined


def annotation(config: ConfigDict, bases: Bases, mesh: Mesh, platform: str, shape: BatchShape | None) -> Stage:
    """A program for everything that is read in one pass."""
    settings = config.annotate
    shape = shape or largest_shape(config, settings.micro_batch, 2, row_devices(mesh))
    batch = abstract_batch(mesh, shape, settings.micro_batch)
    programs = []
    for columns, model, lora in passes(config):
        base = bases[model]
        compute = compute_on(mesh, config, model, base, platform)
        dtype = settings.teacher_weights if model == "teacher" else "float32"
        if columns == ["start"]:
            dtype = base_dtype(config, "train")
        params = shard_shapes(mesh, param_shapes(base, jnp.dtype(dtype)))
        decoder, adapters = base, {}
        if lora is not None:
            decoder = with_lora(base, lora.rank, lora.alpha, lora.targets)
            own = shard_shapes(mesh, adapter_shapes(decoder))
            adapters = jax.tree.map(partial(_stacked, mesh, len(columns)), own)
        decoder, params = after_sft(config, model, dtype, decoder, params, mesh)
        memory = {"parameters": device_bytes(params) + device_bytes(adapters), "batch": device_bytes(batch)}
        traced = make_scorer(decoder, compute).trace(adapters, params, batch, batch.pair)
        programs.append(
            Program("+".join(columns), traced, 1, memory, 0.0, decoder, compute, count(param_shapes(base)), 0)
        )
    return Stage("annotate", "teacher", mesh, settings.micro_batch, settings.micro_batch, shape, tuple(programs))


def passes(config: ConfigDict) -> list[tuple[list[str], Model, ConfigDict | None]]:
    """What annotation reads in one pass: columns, whose tokens, and the adapters; see `stages.read_together`."""
    columns: dict[str, tuple[str, Model]] = {
        "reference": ("teacher_sft", "teacher"),
        "start": ("student_sft", "student"),
    }
    for name in ("positive", "negative"):
        if config.weights.source in ("dpo", "sft"):
            columns[name] = (name, config.weights[f"{name}_scorer"])
        elif config.weights.source == "prompts":
            columns[name] = (f"{config.weights[f'{name}_scorer']}_sft", config.weights[f"{name}_scorer"])
    found: dict[object, tuple[list[str], Model, ConfigDict | None]] = {}
    for name, (stage, model) in columns.items():
        trained = not stage.endswith("_sft") and not left_out(config, stage)
        lora = config[stage].lora if trained and config[stage].lora.rank else None
        key = (model, lora.to_json()) if lora is not None else name
        found.setdefault(key, ([], model, lora))[0].append(name)
    return list(found.values())


def _stacked(mesh: Mesh, models: int, leaf: Any) -> Any:
    where = NamedSharding(mesh, P(None, *leaf.sharding.spec))
    return jax.ShapeDtypeStruct((models, *leaf.shape), leaf.dtype, sharding=where)
