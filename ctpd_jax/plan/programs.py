"""The programs of a stage, traced from shapes alone: no weights, no data.

Letters: R rows, L row length, K scored tokens of a row, P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ctpd_jax.buckets.objects import at_hand
from ctpd_jax.data.loader import padding, plan_shapes
from ctpd_jax.data.packing import PackingConfig, round_up
from ctpd_jax.data.rows import BatchShape, PairItem, ScoredResponse
from ctpd_jax.errors import UserError
from ctpd_jax.job.recipe import packing, passes, reading, recipe
from ctpd_jax.job.table import columns, is_sft, trained_model
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.hf.config import from_hf, read_config
from ctpd_jax.schema import Batch, Model, RowLayout, SpanSlots
from ctpd_jax.sharding import ROWS, replicated

KNOWN_MODELS = Path(__file__).with_name("known_models.json")

Bases = Mapping[Model, DecoderConfig]  # the models as the user brings them


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
class Programs:
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
    reading = {column.model for column in columns(config).values() if not column.outside}
    models = reading if stage == "annotate" else {trained_model(config, stage)}
    return {model: decoder_of(config, model) for model in models}


def decoder_of(config: ConfigDict, model: Model) -> DecoderConfig:
    """The model's config: of a folder, of a model that is known here, or fetched from the hub (config.json alone).

    Raises:
        UserError: the path is none of them.
    """
    # A folder, or a model that is known here without the hub, or else its config.json alone from there.
    path = config[model].path
    if not path:
        raise UserError(f"config.{model}.path is empty; give a folder with a config.json, or a hub id.")
    folder = at_hand(path, weights=False)
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


def largest_shape(config: ConfigDict, pairs: int, responses: int, rows: PackingConfig) -> BatchShape:
    """The shape that takes any micro-batch of `pairs`, all prompts and responses being as long as they may be.

    Packed rows of real data are fewer: few responses are of full length.
    """
    # 1. The tokens of one unit, all as long as they may be.
    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    together = rows.layout != "response"
    scored = responses * response if together else response
    tokens = prompt + scored
    # 2. The row that takes it.
    length = rows.length or int(round_up(tokens, rows.multiple))
    if tokens > length:
        raise UserError(
            f"config.rows.length is {length}, but a row has to take up to {tokens} tokens at once: raise it, set it to "
            "0, or lower config.data.max_prompt_tokens or config.data.max_response_tokens."
        )
    # 3. How many such rows a micro-batch fills, and how many slots of a row are scored.
    room = length // tokens if rows.packed else 1  # units of a row
    units = pairs if together else pairs * responses
    # Of packed rows, several units with short prompts may fill one.
    slots = length if rows.packed else min(length, int(round_up(scored, rows.multiple)))
    return BatchShape(int(round_up(-(-units // room), rows.row_multiple)), length, slots)


def usual_padding(config: ConfigDict, name: str, mesh: Mesh) -> float:
    """The share of padding, were lengths spread evenly from a fifth of what `config.data` allows to all of it.

    About what UltraFeedback has; a plan sees no data.
    """
    # Lengths without data: as many random items as make whole updates.
    settings, sft = config[name], name != "annotate" and is_sft(config, name)
    part = settings.pairs_per_shard if name == "annotate" else settings.batch_size
    lengths = np.random.default_rng(0).uniform(0.2, 1.0, (max(256, part) // part * part, 3))
    limits = np.array([config.data.max_prompt_tokens, *[config.data.max_response_tokens] * 2])

    def item(prompt: int, *responses: int) -> PairItem:
        chosen, rejected = (ScoredResponse(np.zeros(n, np.int32), np.zeros(n, np.float32)) for n in responses)
        return PairItem(np.zeros(prompt, np.int32), chosen, None if sft else rejected)

    items = [item(*row) for row in np.ceil(lengths * limits).astype(int).tolist()]
    # Laid out as the run would lay them out.
    rows = packing(config, mesh, None, "tpu")
    parts = np.arange(len(items)).reshape(-1, part)
    micro_batch = min(settings.micro_batch, part)
    return padding(items, parts, micro_batch, rows, plan_shapes(items, parts, micro_batch, rows))


def abstract_batch(mesh: Mesh, shape: BatchShape, pairs: int, extra: Sequence[str] = ()) -> Batch:
    """A batch as jax.ShapeDtypeStruct, placed as `sharding.place_batch` places it; `extra` are optional fields."""
    by_row, whole = NamedSharding(mesh, P(ROWS)), replicated(mesh)

    def array(size: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=where)

    row = array((shape.rows, shape.length), jnp.int32, by_row)
    slot = array((shape.rows, shape.scored), jnp.int32, by_row)
    weight = array((shape.rows, shape.scored), jnp.float32, by_row)
    both, one = array((pairs, 2), jnp.float32, whole), array((pairs,), jnp.float32, whole)
    optional = {"label": one, "pair_weight": one, "spans": SpanSlots(slot, weight, weight)}
    batch = Batch(row, RowLayout(row, row, row), slot, slot, slot, slot, weight, both, both, both, one)
    return batch._replace(**{name: optional[name] for name in extra})


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
) -> Programs:
    """Traces the programs of a stage, for micro-batches of `shape` or of the largest that can come.

    Raises:
        UserError: where the run itself would refuse.
    """
    if name == "annotate":
        return annotation(config, bases, mesh, platform, shape)
    return training(config, name, bases, mesh, platform, shape)


def training(
    config: ConfigDict, name: str, bases: Bases, mesh: Mesh, platform: str, shape: BatchShape | None
) -> Programs:
    """The two programs of an update, as the stage's recipe gives them to a run."""
    settings, base = config[name], bases[trained_model(config, name)]
    what = recipe(config, name, base, mesh, platform=platform)
    accumulate, update = what.programs()
    state = what.state

    # A micro-batch and its memory, what lies beside it included.
    micro_batch = min(settings.micro_batch, settings.batch_size)
    rows = packing(config, mesh, None, platform)
    shape = shape or largest_shape(config, micro_batch, 1 if is_sft(config, name) else 2, rows)
    batch = abstract_batch(mesh, shape, micro_batch, what.extra)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    memory = {
        "parameters": device_bytes(what.trainable) + device_bytes(what.frozen),
        "optimizer": device_bytes(state.opt_state),
        "gradient": device_bytes(what.trainable),
        "batch": device_bytes(batch),
    }

    # Traced with shapes where the run has arrays.
    of_model = (what.decoder, what.compute, count(param_shapes(base)), count(what.trainable))
    micro_batches = -(-settings.batch_size // micro_batch)
    adding = accumulate.trace(what.trainable, what.frozen, what.trainable, batch)
    spending = update.trace(state, what.trainable, scalar)
    programs = (
        Program("accumulate", adding, micro_batches, memory, memory["optimizer"], *of_model),
        Program("update", spending, 1, memory | {"batch": 0.0}, device_bytes(what.frozen), *of_model),
    )
    return Programs(name, what.model, mesh, settings.batch_size, micro_batch, shape, programs)


def annotation(config: ConfigDict, bases: Bases, mesh: Mesh, platform: str, shape: BatchShape | None) -> Programs:
    """A program for everything that is read in one pass."""
    settings, asked = config.annotate, columns(config)
    shape = shape or largest_shape(config, settings.micro_batch, 2, packing(config, mesh, None, platform))
    batch = abstract_batch(mesh, shape, settings.micro_batch)
    programs = []
    for names in passes(config, bases):
        # Those of one pass share everything but the adapters: the first stands for all.
        column, stages = asked[names[0]], tuple(asked[name].stage for name in names)
        base = bases[column.model]
        what = reading(config, stages, column.dtype, base, mesh, platform)
        memory = {"parameters": device_bytes(what.base) + device_bytes(what.adapters), "batch": device_bytes(batch)}
        traced = what.program().trace(what.adapters, what.base, batch, batch.pair)
        of_model = (what.decoder, what.compute, count(param_shapes(base)), 0)
        programs.append(Program("+".join(names), traced, 1, memory, 0.0, *of_model))
    return Programs(
        "annotate",
        "teacher" if "teacher" in bases else "student",
        mesh,
        settings.micro_batch,
        settings.micro_batch,
        shape,
        tuple(programs),
    )
