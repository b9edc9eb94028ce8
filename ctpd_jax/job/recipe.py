"""What a stage executes: its recipe. Runs jit it, `ctpd plan` traces it, and the preflight meets its refusals early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.annotate.scorer import make_scorer
from ctpd_jax.core.losses import LOSSES, smooths
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.errors import UserError
from ctpd_jax.job import lineage
from ctpd_jax.job.lineage import Shapes
from ctpd_jax.job.models import compute_on, layout_of
from ctpd_jax.job.table import STAGES, base_dtype, columns, is_sft, left_out, trained_model
from ctpd_jax.models.attention_backends import platform_of
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, param_shapes
from ctpd_jax.models.hf.families import FAMILIES
from ctpd_jax.models.lora import adapter_shapes
from ctpd_jax.schema import Model
from ctpd_jax.sharding import row_devices, shard_shapes
from ctpd_jax.train.distill import distill_sums, method_of, projector_shapes
from ctpd_jax.train.loop import Recipe
from ctpd_jax.train.sums import Objective, preference_sums, sft_sums

PROGRAM = 5e10  # parameters times tokens that a CPU trains on, or half of those that it reads, while it compiles
MOST_SHAPES = 12  # where programs are cheap
UNKNOWN_STEPS = 100  # where no data says how many updates there are; no shape depends on it


def recipe(
    config: ConfigDict,
    stage: str,
    decoder: DecoderConfig,
    mesh: Mesh,
    steps: int = 0,
    platform: str | None = None,
    teacher: DecoderConfig | None = None,
) -> Recipe:
    """What a training stage executes on a mesh.

    Args:
        decoder: of the model that it trains, as the user brought it.
        steps: updates; 0 where they are not known.
        platform: "tpu" where the mesh's devices only stand for some.
        teacher: of the model whose distributions are learnt, for distillation.

    Raises:
        UserError: such a model cannot be trained, or not so: adapters on matrices that it does not have, an attention
            back end that cannot do what is asked, a mesh that does not divide it.
    """
    # Can it be trained, and so?
    settings, model = config[stage], trained_model(config, stage)
    if not FAMILIES[decoder.family].trainable:
        raise UserError(
            f"{stage}: the {model} {config[model].path} is a mixture of experts; those can score, but are not trained. "
            f"Set config.{stage}.steps=-1, or for the contrastive pair config.weights.source=prompts."
        )
    check_loss(config, stage)
    compute = compute_on(mesh, config, model, decoder, platform)

    # What the stage begins with; under adapters that lies still, and only they are trained.
    origin = lineage.base(Shapes(config, {model: decoder}), config, stage, base_dtype(config, stage))
    trainable, frozen = origin.params, {}
    if settings.lora.rank:
        trainable, frozen = adapter_shapes(lineage.with_adapters(config, stage, decoder)), origin.params

    # What it minimises.
    loss: Callable = partial(sft_sums, origin.decoder, compute)
    extra: tuple[str, ...] = ()
    if teacher is not None and STAGES[stage].kind == "distill":
        loss, extra = (
            partial(distill_sums, method_of(stage, settings, teacher), settings, origin.decoder, compute),
            ("teacher",),
        )
        if "projector_lr" in settings:  # DSKD: matrices between the two spaces, and the teacher's unembedding
            head = jax.ShapeDtypeStruct((teacher.vocab_size, teacher.hidden_size), jnp.float32)
            trainable = trainable | {"projectors": projector_shapes(decoder, teacher)}
            frozen = frozen | {"teacher": {"lm_head": {"weight": head}}}
    elif not is_sft(config, stage):
        objective, extra = objective_of(settings)
        loss = partial(preference_sums, origin.decoder, objective, compute)
    return Recipe(
        stage,
        model,
        settings,
        steps or max(settings.steps, 0) or UNKNOWN_STEPS,
        origin.decoder,
        compute,
        loss,
        shard_shapes(mesh, trainable),
        shard_shapes(mesh, frozen),
        mesh,
        extra,
    )


def objective_of(settings: ConfigDict) -> tuple[Objective, tuple[str, ...]]:
    """What a preference stage minimises, and the optional fields of Batch that it reads."""
    name = settings.get("objective", "ctpd")
    # Most of what sets objectives apart lies in the weights and constants of the items: annotate.coefficients.
    beyond: dict[str, Any] = {}
    if name == "regression":
        beyond = {"preference": False, "regression": 1.0}
    elif name == "mixed":
        beyond = {"regression": settings.regression}
    extra: tuple[str, ...] = ("spans",) if beyond else ()
    field = {"label": "label", "weight": "pair_weight"}.get(settings.get("margin_as", "none"))
    if field:
        extra += (field,)
    return Objective(settings.beta, settings.label_smoothing, settings.loss, settings.sft_weight, **beyond), extra


def check_loss(config: ConfigDict, stage: str) -> None:
    """Refuses a loss that is not in the table, and label smoothing for one that has none."""
    settings = config[stage]
    if "loss" not in settings:
        return
    if settings.loss not in LOSSES:
        raise UserError(f"config.{stage}.loss is {settings.loss!r}; choose one of {', '.join(LOSSES)}.")
    if settings.label_smoothing and not smooths(settings.loss):
        raise UserError(
            f"config.{stage}.label_smoothing is {settings.label_smoothing!r}; the {settings.loss} loss has none, "
            "set it to 0."
        )


@dataclass(frozen=True)
class Reading:
    """What is executed where models only read: one, or adapters of one shape over one base in one pass."""

    decoder: DecoderConfig  # with all adapters that run
    compute: Compute
    base: Params  # jax.ShapeDtypeStruct with shardings
    adapters: Params  # likewise, stacked [C, ...]; {} for a single model

    def program(self) -> jax.stages.Wrapped:
        """The jitted program; see `make_scorer`."""
        return make_scorer(self.decoder, self.compute)


def reading(
    config: ConfigDict,
    stages: tuple[str, ...],
    dtype: str,
    decoder: DecoderConfig,
    mesh: Mesh,
    platform: str | None = None,
) -> Reading:
    """What is executed to read with the models that stages left, their parameters as `dtype`."""
    model = trained_model(config, stages[0])
    compute = compute_on(mesh, config, model, decoder, platform)
    origin, adapters = lineage.finished(Shapes(config, {model: decoder}), config, stages, dtype)
    stacked = placed_stack(mesh, adapters) if adapters else {}
    return Reading(origin.decoder, compute, shard_shapes(mesh, origin.params), stacked)


def placed_stack(mesh: Mesh, adapters: Params) -> Params:
    """Stacked adapters [C, ...] on a mesh, as shapes: each model's lie as they would alone."""
    alone = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), adapters)

    def stacked(leaf: Any, own: Any) -> Any:
        where = jax.NamedSharding(mesh, jax.P(None, *own.sharding.spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(stacked, adapters, shard_shapes(mesh, alone))


def passes(config: ConfigDict, decoders: Mapping[Model, DecoderConfig]) -> list[tuple[str, ...]]:
    """The columns that are read here, those together that are read in one pass: adapters of one shape over one base."""
    # Models that were trained whole, and starts, share nothing: each is a pass of its own.
    groups: dict[object, list[str]] = {}
    for name, column in columns(config).items():
        if column.outside:
            continue
        adapted = not column.stage.endswith("_sft") and not left_out(config, column.stage)
        lora = lineage.with_adapters(config, column.stage, decoders[column.model]).lora if adapted else None
        groups.setdefault((column.model, lora) if lora else name, []).append(name)
    return [tuple(names) for names in groups.values()]


def packing(
    config: ConfigDict, mesh: Mesh, decoder: DecoderConfig | None, platform: str | None = None, reads: bool = False
) -> PackingConfig:
    """How responses lie in rows for a decoder that trains or `reads`; None where none is at hand, as in a plan.

    Not packed on a CPU: its attention costs the square of a row's length. There, few rows at once are as fast as many,
    and a program is compiled in seconds: as many shapes as save more time than that.
    """
    rows, platform = config.rows, platform or platform_of(mesh.devices.flat[0])
    packed = rows.packed == "yes" or (rows.packed == "auto" and platform != "cpu")
    layout = layout_of(config, platform)
    fewer = rows.fewer == "yes" or (rows.fewer == "auto" and platform == "cpu" and not packed)
    found = PackingConfig(layout, packed, rows.buckets or 4, rows.multiple, rows.length, row_devices(mesh), fewer)
    if rows.buckets or platform != "cpu" or not decoder:
        return found
    parameters = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(decoder)))
    return replace(found, buckets=MOST_SHAPES, program=PROGRAM * (2 if reads else 1) / parameters)
