"""One run: its config, its folder, and what every stage needs of models and data, loaded when first asked for."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.data.packing import PackingConfig as Rows
from ctpd_jax.errors import UserError
from ctpd_jax.files import sha256_file, write_json
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.hf import load_hf, model_directory
from ctpd_jax.models.hf_config import read_config
from ctpd_jax.models.lora import adapter_shapes, beside, join, merge, scaled, split, with_lora
from ctpd_jax.models.support import choose_backend, platform_of
from ctpd_jax.report import show
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair, Counters, Model, PreferencePair
from ctpd_jax.settings import left_out, sft_stays_apart
from ctpd_jax.sharding import (
    check_heads,
    first_process,
    make_mesh,
    param_sharding,
    patiently,
    pieces_on_host,
    row_devices,
    shard_shapes,
)  # fmt: skip
from ctpd_jax.text.columns import Reading
from ctpd_jax.text.preferences import load_preferences, overlap, require_kept
from ctpd_jax.text.prepare import RULES, Limits, prepare_pairs
from ctpd_jax.text.prompts import TextModel, load_text_model
from ctpd_jax.toy.builder import prepare_toy
from ctpd_jax.toy.models import make_toy_models
from ctpd_jax.train.checkpoint import load_params
from ctpd_jax.train.metrics import MetricLog
from ctpd_jax.train.step import Compute, Params
from ctpd_jax.workdir import read_json, require_same

Split = Literal["train", "test"]
MODELS: tuple[Model, Model] = ("teacher", "student")


@dataclass(frozen=True)
class Run:
    """What the stages share. Nothing here changes; what is expensive is made once, when it is first asked for."""

    config: ConfigDict
    workdir: Path
    log: MetricLog
    say: Callable[[str], None] = print
    local: bool = False  # sees the devices of its own process alone; see `here`
    _folders: dict[str, Path] = field(default_factory=dict)
    _texts: dict[str, TextModel] = field(default_factory=dict)
    _loaded: dict[str, tuple[list[PreferencePair], list[AlignedPair]]] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ models

    def folder(self, model: Model) -> Path:
        """The model's folder, downloaded or made where that is needed."""
        if model not in self._folders:
            path = self.config[model].path
            if self.config.data.train == "toy" and not path:
                teacher, student = make_toy_models(self.workdir / "toy" / "models", self.config.seed)
                self._folders[model] = teacher if model == "teacher" else student
            elif not path:
                raise UserError(f"config.{model}.path is empty; give a folder in Hugging Face format or a hub id.")
            else:
                self._folders[model] = model_directory(path)
        return self._folders[model]

    def decoder(self, model: Model) -> DecoderConfig:
        return read_config(self.folder(model))

    def text(self, model: Model) -> TextModel:
        """The model's tokenizer and template, probed."""
        if model not in self._texts:
            settings = self.config[model]
            folder = str(self.folder(model))
            self._texts[model] = load_text_model(folder, settings.template, settings.template_variables)
        return self._texts[model]

    def weights_digest(self, model: Model) -> str:
        """SHA-256 over the model's files; remembered in the workdir for as long as sizes and times stay."""
        files = sorted([*self.folder(model).glob("*.safetensors"), self.folder(model) / "config.json"])
        key = "|".join(f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
        known = read_json(self.workdir / "models.json") or {}
        if known.get(model, {}).get("files") != key:
            joined = "".join(sha256_file(file) for file in files)
            known[model] = {"files": key, "weights": hashlib.sha256(joined.encode()).hexdigest()}
            if first_process():
                write_json(self.workdir / "models.json", known)
        return known[model]["weights"]

    def text_digest(self, model: Model) -> dict[str, Any]:
        """What identifies a model's text side: SHA-256 of its tokenizer and of its template, and what ends a turn."""
        text = self.text(model)
        return {
            "tokenizer": text.tokenizer.fingerprint,
            "template": text.template.fingerprint,
            "end_of_turn": text.end_of_turn,
        }

    def compute(self, model: Model) -> Compute:
        """How the model is run. Raises UserError where config.attention cannot do what the model or its rows need."""
        return compute_on(self.mesh, self.config, model, self.decoder(model))

    @cached_property
    def mesh(self) -> Mesh:
        """All devices; of several processes' `here`, those of this one, which share every parameter among them."""
        if self.local:
            return make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.local_devices())
        return make_mesh(self.config.mesh)

    @cached_property
    def here(self) -> Run:
        """The run for work that is divided among processes, or done by one: on the devices of this process alone."""
        return self if self.local or jax.process_count() == 1 else replace(self, local=True)

    def reading_dtype(self, model: Model) -> str:
        """Of the model's parameters where it only reads or answers."""
        half = model == "teacher" and self.config.annotate.teacher_weights == "bfloat16"
        return "bfloat16" if half else "float32"

    def start_params(self, model: Model, dtype: str = "float32") -> Params:
        """The checkpoint that the user brought."""
        return load_hf(self.folder(model), dtype=dtype, sharding=param_sharding(self.mesh))[1]

    def params_of(self, stage: str, model: Model, dtype: str = "float32") -> Params:
        """The parameters that a training stage left, adapters merged; what it would start from where it is left out.

        They are read as `dtype`, without a wider copy on the devices; merging adapters makes float32 products of one
        kind of matrix at a time.
        """
        if self.left_out(stage):
            sft = f"{model}_sft"
            return self.start_params(model, dtype) if stage == sft else self.params_of(sft, model, dtype)
        self.require(stage)
        config = self.trained_decoder(stage, model)
        if config.lora is not None:
            return merge(config, self.base(stage, model, dtype), self.adapters(stage, model))
        return load_params(self.workdir / stage / "params", self.abstract(model, dtype), self.local, cast=True)[0]

    def start(self, model: Model, dtype: str) -> tuple[DecoderConfig, Params]:
        """The model after its SFT: the very numbers that every other stage with a base of that dtype starts from.

        Its config has the adapters of SFT where those stay beside it.
        """
        sft = f"{model}_sft"
        if not sft_stays_apart(self.config, model, dtype):
            return self.decoder(model), self.params_of(sft, model, dtype)
        return self.trained_decoder(sft, model), join(self.start_params(model, dtype), self.adapters(sft, model))

    def base(self, stage: str, model: Model, dtype: str = "float32") -> Params:
        """What a training stage starts from: SFT from the user's checkpoint, everything else from `start`."""
        if stage == f"{model}_sft":
            return self.start_params(model, dtype)
        before, params = self.start(model, dtype)
        if before.lora is None:
            return params
        lora = self.trained_decoder(stage, model).lora
        assert lora is not None  # without adapters a stage starts from float32
        sft, rest = split(params)
        return join(rest, scaled(sft, before.lora.scale / lora.scale))

    def running_decoder(self, stage: str, model: Model, dtype: str) -> DecoderConfig:
        """The config of a stage's `base`, joined with the adapters that it trains where it does."""
        config, sft = self.trained_decoder(stage, model), f"{model}_sft"
        before = self.trained_decoder(sft, model).lora if sft_stays_apart(self.config, model, dtype) else None
        return config if stage == sft or before is None else beside(config, before)

    def adapters(self, stage: str, model: Model) -> Params:
        """The adapters that a stage trained, relative to `base`."""
        self.require(stage)
        path = self.workdir / stage / "inputs.json"
        trained = (read_json(path) or {}).get("settings", {}).get("lora")
        if trained is not None:  # another alpha would fit their shapes, and count them another number of times
            require_same(self.fingerprint(stage)["lora"], trained, path, "Give the settings that it was trained with.")
        shapes = shard_shapes(self.mesh, adapter_shapes(self.trained_decoder(stage, model)))
        return load_params(self.workdir / stage / "params", shapes, alone=self.local)[0]

    def trained_decoder(self, stage: str, model: Model) -> DecoderConfig:
        """The model's config, with adapters where the stage trains adapters."""
        lora, decoder = self.config[stage].lora, self.decoder(model)
        return with_lora(decoder, lora.rank, lora.alpha, lora.targets) if lora.rank else decoder

    def abstract(self, model: Model, dtype: str = "float32") -> Any:
        """The model's parameters as shapes, and where they lie; norms in float32 whatever the `dtype`.

        Norms are computed in float32, everything else in the compute dtype: where that is bfloat16 too, such parameters
        give the very numbers of float32 ones.
        """

        def kept(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            norm = any("norm" in entry.key for entry in path[-2:])
            return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if norm else jnp.dtype(dtype))

        return shard_shapes(self.mesh, jax.tree.map_with_path(kept, param_shapes(self.decoder(model))))

    # ------------------------------------------------------------------------------------------ stages

    def left_out(self, stage: str) -> bool:
        """Whether the config leaves a stage out."""
        return left_out(self.config, stage)

    def result(self, stage: str) -> dict | None:
        """What a finished stage says of itself; None before it is finished."""
        return read_json(self.workdir / stage / "done.json")

    def require(self, stage: str) -> dict:
        """The stage's result. Raises UserError naming the command that makes it."""
        found = patiently(lambda: self.result(stage))
        if found is None:
            command = {
                "teacher_sft": "ctpd sft --model teacher",
                "student_sft": "ctpd sft --model student",
                "positive": "ctpd dpo",
                "negative": "ctpd dpo --reverse",
                "student_dpo": "ctpd dpo --student",
            }.get(stage, f"ctpd {stage}")
            raise UserError(f"{self.workdir / stage} is not finished; run `{command}` or `ctpd run` first.")
        return found

    def fingerprint(self, stage: str) -> dict[str, Any]:
        """The settings of a stage that decide its numbers beyond rounding; its updates are counted in `steps`."""
        settings = self.config[stage].to_dict()
        if not settings["lora"]["rank"]:
            settings["lora"] = {"rank": 0}
        return {name: value for name, value in settings.items() if name not in ("save_every", "micro_batch", "epochs")}

    def identity(self, stage: str, model: Model) -> str:
        """What identifies the parameters of a stage: their SHA-256, or that of what they would start from."""
        return self.base_identity(stage, model) if self.left_out(stage) else self.require(stage)["params"]

    def base_identity(self, stage: str, model: Model) -> str:
        """What identifies the parameters that a stage starts from."""
        sft = f"{model}_sft"
        return self.weights_digest(model) if stage == sft else self.identity(sft, model)

    # ------------------------------------------------------------------------------------------ data

    @cached_property
    def limits(self) -> Limits:
        return Limits.of(self.config.data)

    def _load(self, split: Split) -> tuple[list[PreferencePair], list[AlignedPair]]:
        if split not in self._loaded:
            data = self.config.data
            spec, name = (data.train, data.train_split) if split == "train" else (data.test, data.test_split)
            limit = data.limit if split == "train" else data.test_limit
            if not spec:
                raise UserError(f"config.data.{split} is empty; give FILE.jsonl, tfds:NAME or hf:NAME.")
            data_dir = None
            if spec == "toy":
                data_dir = self.workdir / "toy" / "data"
                spec = prepare_toy(data_dir, seed=self.config.seed, **self.config.toy)
            raw, report = load_preferences(spec, name, limit or None, data_dir=data_dir, reading=Reading.of(data))
            aligned, counters = prepare_pairs(raw, self.text("teacher"), self.text("student"), self.limits)
            report.merge(counters)
            self._report(split, spec, report)
            require_kept(report, len(aligned), f"{split}: {spec}", data.min_kept)
            for model in MODELS:
                self._check_ids(split, model, aligned)
            self._loaded[split] = raw, aligned
            if len(self._loaded) == 2:
                self.say(show.overlap_line(self.overlap))
        return self._loaded[split]

    def _check_ids(self, split: Split, model: Model, pairs: list[AlignedPair]) -> None:
        """Holds the token ids against the model: JAX would read past the end of a table without a word."""
        decoder = self.decoder(model)
        for pair in pairs:
            prompt, sides = pair.prompt(model), [pair.tokens(model, side).ids for side in (CHOSEN, REJECTED)]
            largest = max(int(ids.max()) for ids in (prompt, *sides))
            length = len(prompt) + max(map(len, sides))
            if largest >= decoder.vocab_size:
                raise UserError(
                    f"The {model}'s tokenizer gives id {largest}, its model in {self.folder(model)} has "
                    f"{decoder.vocab_size} embeddings: tokenizer and weights do not belong together."
                )
            if length > decoder.longest:
                raise UserError(
                    f"{split} pair {pair.id} has {length} {model} tokens, the model takes {decoder.longest}: "
                    "lower config.data.max_prompt_tokens or config.data.max_response_tokens."
                )

    def _report(self, split: str, spec: str, counters: Counters) -> None:
        if first_process():
            first = {"first": counters.notes} if counters.notes else {}
            write_json(self.workdir / f"data_{split}.json", {"source": spec, **counters.counts, **first})
        self.say(f"{split}: {spec}\n  {show.counts(counters)}")

    @property
    def overlap(self) -> dict[str, float]:
        """Which shares of the test pairs and of their prompts are in the training data too."""
        return overlap(self._load("train")[0], self._load("test")[0])

    def raw(self, split: Split) -> dict[str, PreferencePair]:
        """The pairs as they came, by id."""
        return {pair.id: pair for pair in self._load(split)[0]}

    def pairs(self, split: Split) -> list[AlignedPair]:
        """The pairs ready for both models, in the order of the source."""
        return self._load(split)[1]

    def data_identity(self, split: Split) -> dict[str, Any]:
        """What identifies the prepared data: the examples in their order, and how they were cut."""
        ids = hashlib.sha256("\n".join(pair.id for pair in self.pairs(split)).encode()).hexdigest()
        return {
            "examples": ids,
            "count": len(self.pairs(split)),
            "max_prompt_tokens": self.limits.prompt,
            "max_response_tokens": self.limits.response,
            "unit": self.limits.unit,
            "end_of_turn": self.limits.end_of_turn,
            "end_of_turn_both": self.limits.end_of_turn_both,
            "rules": RULES,
            "teacher": self.text_digest("teacher"),
            "student": self.text_digest("student"),
        }

    @cached_property
    def rows(self) -> Rows:
        """How responses are laid out. On a CPU in short rows: its attention costs the square of their length."""
        rows = self.config.rows
        packed = rows.packed == "yes" or (rows.packed == "auto" and jax.default_backend() != "cpu")
        return Rows(rows.layout, packed, rows.buckets, rows.multiple, rows.length, row_devices(self.mesh))


def dtype_of(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> str:
    """The dtype of the products of every model on a mesh."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return "bfloat16" if (platform or platform_of(mesh.devices.flat[0])) == "tpu" else "float32"


def compute_on(
    mesh: Mesh, config: ConfigDict, model: Model, decoder: DecoderConfig, platform: str | None = None
) -> Compute:
    """How a model is run on a mesh. Raises UserError where config.attention cannot do what model and rows need."""
    dtype, platform = dtype_of(config, mesh, platform), platform or platform_of(mesh.devices.flat[0])
    try:
        backend = choose_backend(config.attention, decoder, dtype, config.rows.layout == "shared", platform)
    except UserError as error:
        raise UserError(f"The {model}: {error}") from error
    check_heads(mesh, decoder.num_heads, decoder.num_kv_heads, f"The {model}")
    return Compute(dtype, config[model].remat, backend, mesh)


def params_digest(params: Params) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters: equal exactly where they are bit-identical."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        for piece in pieces_on_host(leaf):
            digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.hexdigest()


def check_sizes(run: Run) -> None:
    """Refuses swapped folders: a teacher with fewer parameters than its student is seldom meant."""
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(run.abstract(name))) for name in MODELS}
    if sizes["teacher"] < sizes["student"] and not run.config.smaller_teacher:
        raise UserError(
            f"The teacher {run.folder('teacher')} has {sizes['teacher']:,} parameters, the student "
            f"{run.folder('student')} {sizes['student']:,}: are they swapped? If not, --config.smaller_teacher=True."
        )


def check_platform(config: ConfigDict) -> None:
    """Refuses to fall back to the CPU silently, as JAX does where an accelerator is there but busy."""
    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        raise UserError(
            f"JAX cannot start: {str(error).splitlines()[0]} (config.platform = {config.platform!r})"
        ) from error
    if config.platform not in ("auto", backend):
        raise UserError(f"config.platform asks for {config.platform}, JAX found {backend}.")
    seen = importlib.util.find_spec("libtpu") is not None and any(
        os.path.exists(device) for device in ("/dev/accel0", "/dev/vfio/0")
    )
    seen = seen or os.path.exists("/dev/nvidia0")
    if backend == "cpu" and seen and config.platform == "auto" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        raise UserError(
            "This machine has an accelerator, but JAX found only the CPU: it is busy, or jax was installed without it. "
            "Set --config.platform=cpu to go on without."
        )
