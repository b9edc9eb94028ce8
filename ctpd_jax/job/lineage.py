"""Where a stage's model comes from: the user's checkpoint, what SFT made of it, and the adapters on top.

The same walk is taken twice: by a run, which reads parameters (`Files`), and before it by its recipe and by
`ctpd plan`, which need their shapes alone (`Shapes`). So what is planned is what is read.

    checkpoint --teacher_sft--> start --positive--> trained whole, or adapters beside the start
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from ctpd_jax.artifacts import read_record, require_same
from ctpd_jax.job.job import Job, require
from ctpd_jax.job.models import decoder_of, folder, weights_digest
from ctpd_jax.job.table import fingerprint, left_out, starts_from, trained_model
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, leaves, param_shapes
from ctpd_jax.models.hf import load_hf
from ctpd_jax.models.hf.load import held_as
from ctpd_jax.models.lora import adapter_shapes, beside, join, merge, scaled, split, with_lora
from ctpd_jax.schema import Model
from ctpd_jax.sharding import gathered, param_sharding, pieces_on_host, shard_shapes, spread
from ctpd_jax.train.checkpoint import load_params


@dataclass(frozen=True)
class Origin:
    """What a stage's model consists of: `params` belong to `decoder`, whose adapters they hold where it has some."""

    decoder: DecoderConfig
    params: Params


def start(source: Source, config: ConfigDict, model: Model, dtype: str) -> Origin:
    """The model after its SFT: the very numbers that every other stage with a base of that dtype starts from."""
    # Without an SFT, or trained whole, there is one tree of parameters and nothing beside it.
    sft, decoder = f"{model}_sft", held_as(source.decoder(model), dtype)
    if left_out(config, sft):
        return Origin(decoder, source.checkpoint(model, dtype))
    if not config[sft].lora.rank:
        return Origin(decoder, source.trained(sft, dtype))
    # Trained as adapters, they are merged where the matrices can hold them.
    adapted, adapters = with_adapters(config, sft, decoder), source.adapters(sft)
    whole = source.checkpoint(model, dtype)
    if dtype != "float32":
        # A rounded matrix could not hold them: most of what they add to an entry is less than its rounding.
        return Origin(adapted, source.apply(join, whole, adapters))
    return Origin(decoder, source.apply(lambda base, own: merge(adapted, base, own), whole, adapters))


def base(source: Source, config: ConfigDict, stage: str, dtype: str) -> Origin:
    """What a training stage begins with, with the config of all adapters that run; its own are still to be joined."""
    # SFT begins with the checkpoint itself, everything else with the model after SFT.
    model = trained_model(config, stage)
    own = with_adapters(config, stage, held_as(source.decoder(model), dtype))
    if not starts_from(config, stage):
        return Origin(own, source.checkpoint(model, dtype))
    before = start(source, config, model, dtype)
    if before.decoder.lora is None:
        return Origin(own, before.params)
    # SFT's adapters stay beside the base, with the stage's own: what they count is set by the stage's alpha / rank.
    assert own.lora is not None  # without adapters a stage starts from float32
    factor = before.decoder.lora.scale / own.lora.scale

    def rescaled(params: Params) -> Params:
        sft, rest = split(params)
        return join(rest, scaled(sft, factor))

    return Origin(beside(own, before.decoder.lora), source.apply(rescaled, before.params))


def finished(source: Source, config: ConfigDict, stages: tuple[str, ...], dtype: str) -> tuple[Origin, Params]:
    """The models that stages left, ready to be read in one pass: what they share, and their adapters, stacked [C, ...].

    Several stages are adapters of one shape over one base; a stage that is left out is its start. The second is {} but
    for adapters that stages other than SFT have trained.
    """
    # What several stages share, the first of them knows.
    stage = stages[0]
    model = trained_model(config, stage)
    if left_out(config, stage) or not starts_from(config, stage):
        return start(source, config, model, dtype), {}
    if not config[stage].lora.rank:
        return Origin(source.decoder(model), source.trained(stage, dtype)), {}
    trees = [source.adapters(name) for name in stages]
    stacked = source.apply(lambda *own: jax.tree.map(lambda *leaves: jnp.stack(leaves), *own), *trees)
    return base(source, config, stage, dtype), stacked


def merged(source: Source, config: ConfigDict, stage: str) -> Params:
    """The parameters that a stage left, float32, in one tree without adapters: what is exported."""
    if left_out(config, stage) or not starts_from(config, stage):
        return start(source, config, trained_model(config, stage), "float32").params
    if not config[stage].lora.rank:
        return source.trained(stage, "float32")
    before, adapters = base(source, config, stage, "float32"), source.adapters(stage)
    return source.apply(lambda whole, own: merge(before.decoder, whole, own), before.params, adapters)


def with_adapters(config: ConfigDict, stage: str, decoder: DecoderConfig) -> DecoderConfig:
    """The model's config, with adapters where the stage trains adapters."""
    lora = config[stage].lora
    return with_lora(decoder, lora.rank, lora.alpha, lora.targets) if lora.rank else decoder


# ------------------------------------------------------------------------------------------------ the two sources


@dataclass(frozen=True)
class Shapes:
    """Parameters as jax.ShapeDtypeStruct, placed nowhere."""

    config: ConfigDict
    decoders: Mapping[Model, DecoderConfig]

    def decoder(self, model: Model) -> DecoderConfig:
        """The config of the model that the user brought."""
        return self.decoders[model]

    def checkpoint(self, model: Model, dtype: str) -> Params:
        """The parameters that the user brought."""
        wide = jnp.dtype("bfloat16" if dtype == "int8" else dtype)
        return param_shapes(held_as(self.decoders[model], dtype), wide)

    def trained(self, stage: str, dtype: str) -> Params:
        """What a stage left that trained all parameters: all but the norms in `dtype`.

        Norms are computed in float32, everything else in the compute dtype: where that is bfloat16 too, such
        parameters give the very numbers of float32 ones.
        """

        def kept(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            norm = any("norm" in entry.key for entry in path[-2:])
            return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if norm else jnp.dtype(dtype))

        return jax.tree.map_with_path(kept, param_shapes(self.decoders[trained_model(self.config, stage)]))

    def adapters(self, stage: str) -> Params:
        """The adapters that a stage left, float32."""
        return adapter_shapes(with_adapters(self.config, stage, self.decoders[trained_model(self.config, stage)]))

    def apply(self, function: Callable[..., Params], *trees: Params) -> Params:
        """`function` of such trees."""
        return jax.eval_shape(function, *trees)


@dataclass(frozen=True)
class Files:
    """Parameters as the stages of a job left them, read onto a mesh without a wider copy on its devices."""

    job: Job
    mesh: Mesh

    @property
    def alone(self) -> bool:
        """Whether this process reads for itself: Orbax waits for the others where it does not."""
        return self.mesh is self.job.own and jax.process_count() > 1

    def decoder(self, model: Model) -> DecoderConfig:
        return decoder_of(self.job, model)

    def checkpoint(self, model: Model, dtype: str) -> Params:
        where = param_sharding(self.mesh)

        def once(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
            return spread(where(path, shape), shape)

        def read() -> Params:
            # The scales of int8 are made of whole rows: those are read by everyone who holds a part of them.
            together = not self.alone and jax.process_count() > 1 and dtype != "int8"
            params = load_hf(folder(self.job, model), dtype=dtype, sharding=once if together else where)[1]
            if together:
                # One by one: pieces and wholes would be too much for a device.
                for *before, last in [path for path, _ in leaves(params)]:
                    parent = reduce(getitem, before, params)
                    parent[last] = gathered(parent[last], where((*before, last), parent[last].shape))
            return params

        # Trained whole by SFT, it is not asked for again.
        if not left_out(self.job.config, f"{model}_sft") and not self.job.config[f"{model}_sft"].lora.rank:
            return read()
        wanted = shard_shapes(self.mesh, Shapes(self.job.config, {model: self.decoder(model)}).checkpoint(model, dtype))
        return self._held(f"{model}, int8" if dtype == "int8" else model, wanted, read)

    def trained(self, stage: str, dtype: str) -> Params:
        require(self.job, stage)
        return self._load(stage, self._shapes(stage).trained(stage, dtype))

    def adapters(self, stage: str) -> Params:
        require(self.job, stage)
        path = self.job.workdir / stage / "inputs.json"
        trained = (read_record(path) or {}).get("settings", {}).get("lora")
        if trained is not None:  # another alpha would fit their shapes, and count them another number of times
            expected = fingerprint(self.job.config, stage)["lora"]
            require_same(expected, trained, path, "Give the settings that it was trained with.")
        return self._load(stage, self._shapes(stage).adapters(stage))

    def apply(self, function: Callable[..., Params], *trees: Params) -> Params:
        return function(*trees)

    def _shapes(self, stage: str) -> Shapes:
        model = trained_model(self.job.config, stage)
        return Shapes(self.job.config, {model: self.decoder(model)})

    def _load(self, stage: str, shapes: Params) -> Params:
        wanted = shard_shapes(self.mesh, shapes)

        def read() -> Params:
            return load_params(self.job.workdir / stage / "params", wanted, alone=self.alone, cast=True)

        return self._held(stage, wanted, read)

    def _held(self, name: str, wanted: Params, read: Callable[[], Params]) -> Params:
        """What a stage before this one holds in memory, else what is on disk."""
        # What one process has for itself is another copy than that which lies on all.
        together, name = not self.alone, f"{name}, alone" if self.alone else name
        found = self.job.held.get(name, wanted, together)
        if found is None:
            found = read()
            self.job.held.keep(name, found, together)
        return found


Source = Shapes | Files  # what gives parameters, or stands for them


# ------------------------------------------------------------------------------------------------ identities


def identity(job: Job, stage: str) -> str:
    """What identifies the parameters of a stage: their SHA-256, or that of what they would start from."""
    return base_identity(job, stage) if left_out(job.config, stage) else require(job, stage)["params"]


def base_identity(job: Job, stage: str) -> str:
    """What identifies the parameters that a stage starts from."""
    before = starts_from(job.config, stage)
    return identity(job, before) if before else weights_digest(job, trained_model(job.config, stage))


def params_digest(params: Params) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters: equal exactly where they are bit-identical."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        for piece in pieces_on_host(leaf):
            digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.hexdigest()
