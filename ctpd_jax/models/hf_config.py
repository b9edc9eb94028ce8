"""Hugging Face's config.json <-> DecoderConfig.

What all families share is read and written here, the rest by each family's row in `families.py`. Whatever in a
config.json would change the computation and is not understood is refused by name; what cannot change it (`use_cache`,
`transformers_version`) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.files import read_json
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.families import FAMILIES
from ctpd_jax.models.features import Shape
from ctpd_jax.models.hf_fields import Fields

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


# ------------------------------------------------------------------------------------------------ reading


def read_config(directory: str | Path) -> DecoderConfig:
    """The config of a model folder: config.json, and the end-of-sequence ids of generation_config.json if it has any.

    Raises UserError, with the path, for a missing or broken config.json and for everything `from_hf` refuses.
    """
    path = Path(directory) / "config.json"
    raw = _read_object(path)
    if raw is None:
        raise UserError(f"There is no {path.name} in {path.parent}: it is not a Hugging Face model folder.")
    config = from_hf(raw, where=str(path))
    generation = _read_object(path.with_name("generation_config.json")) or {}
    more_eos = _ids(generation.get("eos_token_id"))
    return replace(config, eos_ids=tuple(dict.fromkeys(config.eos_ids + more_eos)))


def _read_object(path: Path) -> dict[str, Any] | None:
    value = read_json(path, "mend it, or fetch the model again")
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return value


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """config.json's content -> DecoderConfig.

    Args:
        raw: the parsed config.json, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5
            (`rope_parameters`).
        where: the file's name, for messages.

    Raises:
        UserError: an unknown architecture, or a field that changes the computation and is not implemented.
    """
    if raw.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is not supported; take a model with bfloat16 or float32 weights."
        )
    name = raw.get("model_type")
    if name is None:
        raise UserError(f"{where} has no field 'model_type': it is not a complete model config.")
    if name not in FAMILIES:
        more = ""
        if f"{name}_text" in FAMILIES:
            more = f" {name!r} is the vision-language model (it has a vision_config); its text model is supported."
        raise UserError(
            f"{where}: model_type {name!r} is not supported; supported are {', '.join(sorted(FAMILIES))}.{more}"
        )
    family = FAMILIES[name]
    fields = Fields(raw, where, family.defaults)
    fields.ignore("model_type")
    shape = Shape(
        hidden=fields.take("hidden_size"),
        heads=fields.take("num_attention_heads"),
        layers=fields.take("num_hidden_layers"),
        positions=fields.take("max_position_embeddings", 2048),
    )
    head_dim = fields.take("head_dim", shape.hidden // shape.heads)
    features: dict[str, Any] = {
        "family": name,
        "vocab_size": fields.take("vocab_size"),
        "hidden_size": shape.hidden,
        "intermediate_size": fields.take(family.width_field),
        "num_layers": shape.layers,
        "num_heads": shape.heads,
        "num_kv_heads": fields.take("num_key_value_heads", shape.heads),
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "norm_eps": fields.take("rms_norm_eps", 1e-6),
        "tied": fields.take("tie_word_embeddings", False),
        "max_positions": shape.positions,
        "initializer_range": fields.take("initializer_range", 0.02),
        **_token_ids(fields),
        **family.read(fields, shape),
    }
    features["activation"] = _activation(fields, family.activation_field)
    fields.refuse_the_rest()
    return DecoderConfig(**features)


def _token_ids(fields: Fields) -> dict[str, Any]:
    """A null in the file means "none"; only an absent field has the family's default."""
    return {
        "bos_id": fields.or_null("bos_token_id"),
        "eos_ids": _ids(fields.or_null("eos_token_id")),
        "pad_id": fields.or_null("pad_token_id"),
    }


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


def _activation(fields: Fields, name: str) -> str:
    value = fields.take(name, "silu")
    if value not in _ACTIVATIONS:
        raise UserError(f"{fields.where}: {name} = {value!r} is not supported; use one of {sorted(_ACTIVATIONS)}.")
    return _ACTIVATIONS[value]


# ------------------------------------------------------------------------------------------------ writing


def to_hf(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """DecoderConfig -> the content of a config.json that transformers 4 and 5 both read; `from_hf` undoes it.

    Both spellings of the rotary parameters and of the dtype are written, since each version reads only its own.
    """
    family = FAMILIES[config.family]
    return {
        "model_type": config.family,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.activation_field: _HF_ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_field(config),
        "pad_token_id": config.pad_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **family.write(config),
    }


def eos_field(config: DecoderConfig) -> int | list[int] | None:
    """The end-of-sequence ids as Hugging Face writes them: a number if there is one, a list if there are several."""
    return config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
