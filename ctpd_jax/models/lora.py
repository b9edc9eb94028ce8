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

from ctpd_jax.artifacts import local_path, replacing_folder, write_json
from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig, Lora
from ctpd_jax.models.decoder import Params, leaves, param_shapes
from ctpd_jax.models.hf import safetensors
from ctpd_jax.models.hf.load import checkpoint_name

_PREFIX = "base_model.model."  # of every tensor in PEFT's files
_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B"}


# ------------------------------------------------------------------------------------------------ trees


def linear_names(config: DecoderConfig) -> tuple[str, ...]:
    """Return the matrices of a layer that can have adapters, by name: ("q_proj", "k_proj", ...)."""
    plain = replace(config, lora=None)
    paths = [path for path, _ in leaves(param_shapes(plain)["model"]["layers"])]
    # Neither norms nor the matrices of experts, nor the router of a mixture.
    found = [path[-2] for path in paths if path[-1] == "weight" and "norm" not in path[-2] and "experts" not in path]
    return tuple(name for name in found if name != "gate")


def with_lora(config: DecoderConfig, rank: int, alpha: float, targets: str = "all") -> DecoderConfig:
    """Return the config with adapters on `targets`: "all" matrices of the layers, or names, "q_proj,v_proj".

    Raises UserError for a name that the model does not have.
    """
    # Kept in the model's own order, so that the same targets always make the same (static, hashed) config.
    names = linear_names(config)
    chosen = set(names) if targets == "all" else {name.strip() for name in targets.split(",")}
    if unknown := sorted(chosen - set(names)):
        raise UserError(f"LoRA targets {', '.join(unknown)}: this model has {', '.join(names)}.")
    return replace(config, lora=Lora(rank, float(alpha), tuple(name for name in names if name in chosen)))


def adapter_shapes(config: DecoderConfig) -> Params:
    """Return the adapters as jax.ShapeDtypeStruct, float32."""
    return split(param_shapes(config))[0]


def init_adapters(config: DecoderConfig, key: jax.Array) -> Params:
    """Draw float32 adapters that change nothing yet: A uniform in +-1/sqrt(in), as in PEFT, and B zero."""
    # Keys in the order of the tree: the same seed draws the same adapters on every mesh.
    flat, tree = jax.tree.flatten_with_path(adapter_shapes(config))

    def fill(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if path[-1].key == "lora_b":
            return jnp.zeros(shape.shape, shape.dtype)
        bound = shape.shape[-1] ** -0.5
        return jax.random.uniform(key, shape.shape, shape.dtype, -bound, bound)

    keys = jax.random.split(key, len(flat))
    return jax.tree.unflatten(tree, [fill(path, leaf, one) for (path, leaf), one in zip(flat, keys)])


def split(params: Params) -> tuple[Params, Params]:
    """Return (adapters, base) of a joined tree; no array is copied."""
    adapters: Params = {}
    base: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            for tree, part in zip((adapters, base), split(value)):
                if part:
                    tree[name] = part
        else:
            (adapters if name in _PARTS else base)[name] = value
    return adapters, base


def join(first: Params, second: Params) -> Params:
    """Join two trees that share no leaf but adapters."""
    joined = dict(first)
    for name, value in second.items():
        # Two adapters of one matrix become one, their ranks side by side.
        if name in _PARTS and name in joined:
            joined[name] = jnp.concatenate([joined[name], value], axis=-2 if name == "lora_a" else -1)
        else:
            joined[name] = join(joined[name], value) if name in joined else value
    return joined


def beside(config: DecoderConfig, other: Lora) -> DecoderConfig:
    """Return the config of its adapters joined to `other` ones, which count as its own do once they are `scaled`."""
    assert config.lora is not None
    targets = (*config.lora.targets, *other.targets)
    return replace(config, lora=replace(config.lora, targets=tuple(n for n in linear_names(config) if n in targets)))


def scaled(adapters: Params, factor: float) -> Params:
    """Return the same adapters for a config whose alpha / rank is `1 / factor` of theirs."""
    # One of the two matrices is enough: the product is linear in each.
    return jax.tree.map_with_path(lambda path, leaf: leaf * factor if path[-1].key == "lora_b" else leaf, adapters)


def merge(config: DecoderConfig, base: Params, adapters: Params) -> Params:
    """Compute W + (alpha / rank) B A in float32 and W's dtype. The base's buffers are reused.

    Adapters that the base has already are merged with the others. The result belongs to `config` without its `lora`.
    """
    assert config.lora is not None
    adapters, base = split(join(base, adapters))
    return _merge(config.lora.scale, base, adapters)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _merge(scale: float, base: Params, adapters: Params) -> Params:
    merged = dict(base)
    for name, value in adapters.items():
        # In float32 even where W is bfloat16: rounded once, at the end.
        if "lora_a" in value:
            product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
            delta = product("lor,lri->loi", value["lora_b"], value["lora_a"])
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
    # 1. PEFT has one tensor for each layer, and asks for the modules by their last name.
    tensors: list[safetensors.TensorToWrite] = []
    modules = set()
    for _, entry, array in peft_entries(config, adapters):
        modules.add(entry.rsplit(".", 3)[-3])
        for layer in range(config.num_layers):
            fetch = partial(lambda array, layer: np.asarray(array[layer]), array, layer)
            tensors.append((entry.format(layer), array.shape[1:], np.dtype(np.float32), fetch))
    # 2. What PEFT reads first.
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    # 3. Both files beside, then renamed together.
    place, files = local_path(directory), ("adapter_config.json", "adapter_model.safetensors")
    with replacing_folder(place, files[0], "a folder of adapters", files.__contains__) as beside:
        safetensors.write(beside / files[1], tensors)
        write_json(beside / files[0], raw)


def peft_entries(config: DecoderConfig, adapters: Params) -> list[tuple[tuple[str, ...], str, Any]]:
    """Return (path, PEFT's name with "{}" for the layer, leaf) of every adapter."""
    found = []
    for path, leaf in leaves(adapters):
        module = checkpoint_name(config, (*path[:-1], "weight")).removesuffix(".weight")
        found.append((path, f"{_PREFIX}{module}.{_PARTS[path[-1]]}.weight", leaf))
    return found
