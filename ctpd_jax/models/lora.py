"""Low-rank adapters: made, joined to a base, merged into it, and in PEFT's format on disk (LoRA, arXiv 2106.09685).

Adapters are a tree of their own, beside the base's: for every matrix of `config.lora.targets` an A and a B,

    y = x W^T + (alpha / rank) (x A^T) B^T,     A = lora_a [L, rank, in],  B = lora_b [L, out, rank].

`config` with its `lora` set belongs to the joined tree, without it to the base alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.artifacts import local_path, read_json, replacing_folder, write_json
from ctpd_jax.errors import UserError
from ctpd_jax.models import safetensors
from ctpd_jax.models.config import DecoderConfig, Lora
from ctpd_jax.models.decoder import Params, param_shapes
from ctpd_jax.models.hf_table import checkpoint_name, leaves

_PREFIX = "base_model.model."  # of every tensor in PEFT's files
_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B"}


# ------------------------------------------------------------------------------------------------ trees


def linear_names(config: DecoderConfig) -> tuple[str, ...]:
    """The matrices of a layer that can have adapters, by name: ("q_proj", "k_proj", ...)."""
    plain = replace(config, lora=None)
    paths = [path for path, _ in leaves(param_shapes(plain)["model"]["layers"])]
    found = [path[-2] for path in paths if path[-1] == "weight" and "norm" not in path[-2] and "experts" not in path]
    return tuple(name for name in found if name != "gate")


def with_lora(config: DecoderConfig, rank: int, alpha: float, targets: str = "all") -> DecoderConfig:
    """The config with adapters on `targets`: "all" matrices of the layers, or names with commas, "q_proj,v_proj".

    Raises:
        UserError: a name that the model does not have.
    """
    names = linear_names(config)
    chosen = set(names) if targets == "all" else {name.strip() for name in targets.split(",")}
    if unknown := sorted(chosen - set(names)):
        raise UserError(f"LoRA targets {', '.join(unknown)}: this model has {', '.join(names)}.")
    return replace(config, lora=Lora(rank, float(alpha), tuple(name for name in names if name in chosen)))


def adapter_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """The adapters as jax.ShapeDtypeStruct."""
    return split(param_shapes(config, dtype))[0]


def init_adapters(config: DecoderConfig, key: jax.Array) -> Params:
    """float32 adapters that change nothing yet: A uniform in +-1/sqrt(in), as in PEFT, and B zero."""
    flat, tree = jax.tree.flatten_with_path(adapter_shapes(config))

    def fill(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if path[-1].key == "lora_b":
            return jnp.zeros(shape.shape, shape.dtype)
        bound = shape.shape[-1] ** -0.5
        return jax.random.uniform(key, shape.shape, shape.dtype, -bound, bound)

    keys = jax.random.split(key, len(flat))
    return jax.tree.unflatten(tree, [fill(path, leaf, one) for (path, leaf), one in zip(flat, keys)])


def split(params: Params) -> tuple[Params, Params]:
    """(adapters, base) of a joined tree; no array is copied."""
    adapters: Params = {}
    base: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            below, rest = split(value)
            if below:
                adapters[name] = below
            if rest:
                base[name] = rest
        else:
            (adapters if name in _PARTS else base)[name] = value
    return adapters, base


def join(first: Params, second: Params) -> Params:
    """One tree of two. They share no leaf but adapters: those of one matrix become one, their ranks side by side."""
    joined = dict(first)
    for name, value in second.items():
        if name in _PARTS and name in joined:
            joined[name] = jnp.concatenate([joined[name], value], axis=-2 if name == "lora_a" else -1)
        else:
            joined[name] = join(joined[name], value) if name in joined else value
    return joined


def beside(config: DecoderConfig, other: Lora) -> DecoderConfig:
    """The config of its adapters joined to `other` ones, whose products then count as its own do: see `scaled`."""
    assert config.lora is not None
    targets = (*config.lora.targets, *other.targets)
    return replace(config, lora=replace(config.lora, targets=tuple(n for n in linear_names(config) if n in targets)))


def scaled(adapters: Params, factor: float) -> Params:
    """The same adapters for a config whose alpha / rank is `1 / factor` of theirs."""
    return jax.tree.map_with_path(lambda path, leaf: leaf * factor if path[-1].key == "lora_b" else leaf, adapters)


def merge(config: DecoderConfig, base: Params, adapters: Params) -> Params:
    """W + (alpha / rank) B A, in float32 and W's dtype, for `config` without `lora`. The base's buffers are reused.

    Adapters that the base has already are merged with the others.
    """
    assert config.lora is not None
    adapters, base = split(join(base, adapters))
    return _merge(config.lora.scale, base, adapters)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _merge(scale: float, base: Params, adapters: Params) -> Params:
    merged = dict(base)
    for name, value in adapters.items():
        if "lora_a" in value:
            delta = jnp.einsum(
                "lor,lri->loi", value["lora_b"], value["lora_a"],
                precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
            )  # fmt: skip
            weight = base[name]["weight"]
            merged[name] = base[name] | {"weight": (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)}
        else:
            merged[name] = _merge(scale, base[name], value)
    return merged


# ------------------------------------------------------------------------------------------------ PEFT's format


def save_peft(directory: str | Path, config: DecoderConfig, adapters: Params, base_model: str) -> None:
    """Write the folder that `peft.PeftModel.from_pretrained(model, folder)` opens.

    Args:
        directory: adapter_config.json and adapter_model.safetensors go there; written beside, then renamed.
        config: with its `lora`.
        adapters: as from `init_adapters`, trained.
        base_model: the folder or hub id of the model that they belong to, noted in the config.

    Raises:
        UserError: the folder exists and holds no adapters.
    """
    assert config.lora is not None
    stacked = [(entry, array) for _, entry, array in _entries(config, adapters)]
    tensors = [
        (entry.format(layer), array.shape[1:], partial(lambda array, layer: np.asarray(array[layer]), array, layer))
        for entry, array in stacked
        for layer in range(config.num_layers)
    ]
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": sorted({entry.rsplit(".", 3)[-3] for entry, _ in stacked}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    names = {"adapter_config.json", "adapter_model.safetensors"}
    with replacing_folder(
        local_path(directory), "adapter_config.json", "a folder of adapters", names.__contains__
    ) as beside:
        safetensors.write(beside / "adapter_model.safetensors", tensors, lambda name: np.dtype(np.float32))
        write_json(beside / "adapter_config.json", raw)


def load_peft(directory: str | Path, config: DecoderConfig) -> tuple[DecoderConfig, Params]:
    """The folder that `save_peft`, or PEFT itself, wrote for a model of `config`: (config with `lora`, adapters).

    Raises:
        UserError: no adapters there, adapters of another kind, or for other matrices than the model's.
    """
    directory = Path(directory)
    raw = read_json(directory / "adapter_config.json", "fetch the adapters again")
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise UserError(f"{directory} holds no LoRA adapters in PEFT's format (adapter_config.json).")
    for name, neutral in (("use_dora", False), ("use_rslora", False), ("rank_pattern", {}), ("alpha_pattern", {})):
        if raw.get(name) not in (None, neutral):
            raise UserError(f"{directory / 'adapter_config.json'}: {name} is not supported.")
    ours = {checkpoint_name(config, path).rsplit(".", 2)[-2]: path[-2] for path, _ in leaves(param_shapes(config))}
    names = [ours.get(name, name) for name in raw["target_modules"]]
    config = with_lora(config, raw["r"], raw["lora_alpha"], ",".join(names))
    stored = safetensors.read_header(directory / "adapter_model.safetensors")
    adapters: Params = {}
    for path, entry, shape in _entries(config, adapter_shapes(config)):
        host = np.empty(shape.shape, np.float32)
        for layer, part in enumerate(host):
            name = entry.format(layer)
            if name not in stored or stored[name].shape != part.shape:
                raise UserError(f"{directory}: adapter tensor {name} {part.shape} is missing or has another shape.")
            safetensors.read_into(stored[name], name, part)
        place = adapters
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = jnp.asarray(host)
    return config, adapters


def _entries(config: DecoderConfig, adapters: Params) -> list[tuple[tuple[str, ...], str, Any]]:
    """(path, PEFT's name with "{}" for the layer, leaf) of every adapter."""
    found = []
    for path, leaf in leaves(adapters):
        module = checkpoint_name(config, (*path[:-1], "weight")).removesuffix(".weight")
        found.append((path, f"{_PREFIX}{module}.{_PARTS[path[-1]]}.weight", leaf))
    return found
