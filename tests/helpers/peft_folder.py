"""Reading adapters in PEFT's format back, to compare them with those that were trained."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ctpd_jax.artifacts import read_json
from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, leaves, param_shapes
from ctpd_jax.models.hf import safetensors
from ctpd_jax.models.hf.load import checkpoint_name
from ctpd_jax.models.lora import adapter_shapes, peft_entries, with_lora


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
    for path, entry, shape in peft_entries(config, adapter_shapes(config)):
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
