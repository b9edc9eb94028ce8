"""Hugging Face's config.json <-> DecoderConfig.

What all families share is read and written here, the rest by `families.py`. Whatever in a config.json would change the
computation and is not understood is refused by name; what cannot change it (`use_cache`) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctpd_jax.artifacts import read_object
from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.hf.families import DEFAULTS, FAMILIES, WITH_EYES, written_fields
from ctpd_jax.models.hf.fields import Fields

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def read_config(directory: str | Path) -> DecoderConfig:
    """Read the config of a model folder: config.json, and the ends of sequence that generation_config.json adds.

    Raises UserError, with the path, for a missing or broken config.json and for everything `from_hf` refuses.
    """
    path = Path(directory) / "config.json"
    if any((path.parent / name).exists() for name in ADAPTERS):
        beside = "beside a model" if path.exists() else "alone, without the model that they belong to"
        raise UserError(
            f"{path.parent} holds adapters in PEFT's format ({ADAPTERS[0]}) {beside}. Merge them into the model's "
            f"weights (peft: model.merge_and_unload(), then save_pretrained into a new folder) and take that folder."
        )
    raw = read_object(path)
    if raw is None:
        raise UserError(f"There is no {path.name} in {path.parent}: it is not a Hugging Face model folder.")
    config = from_hf(raw, where=str(path))
    # Some models say only there what ends their answers.
    generation = path.with_name("generation_config.json")
    more_eos = _token_ids(Fields(read_object(generation) or {}, str(generation)), "eos_token_id", config.vocab_size)
    return replace(config, eos_ids=tuple(dict.fromkeys(config.eos_ids + more_eos)))


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Make a DecoderConfig of config.json's content.

    Args:
        raw: the parsed config.json, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5
            (`rope_parameters`).
        where: the file's name, for messages.

    Raises:
        UserError: an unknown architecture, or a field that changes the computation and is not implemented.
    """
    # 1. The family, which says how the rest is read.
    whole, raw = raw, of_text(raw, where)
    if whole.get("quantization_config") or raw.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is not supported; take a model with bfloat16 or float32 weights."
        )
    name = Fields(raw, where).or_null("model_type")
    if name is None:
        raise UserError(f"{where} has no field 'model_type': it is not a complete model config.")
    if name not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *WITH_EYES}))
        raise UserError(f"{where}: model_type {name!r} is not supported; supported are {known}.")
    family = FAMILIES[name]
    fields = Fields(raw, where, {"max_position_embeddings": 2048, **DEFAULTS[name]})
    fields.ignore("model_type", "quantization_config")

    # 2. What every family has.
    hidden, heads, layers = (fields.take(size) for size in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    positions, head_dim = fields.take("max_position_embeddings"), fields.take("head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise UserError(
                f"{where}: there is no head_dim, and hidden_size ({hidden}) is no multiple of "
                f"num_attention_heads ({heads})."
            )
        head_dim = hidden // heads
    vocab = fields.take("vocab_size")
    features: dict[str, Any] = {
        "family": name,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": fields.take(family.width_field),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.or_null("num_key_value_heads", heads) or heads,
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "norm_eps": fields.take("rms_norm_eps", 1e-6),
        "tied": fields.take("tie_word_embeddings", False),
        "max_positions": positions,
        "initializer_range": fields.take("initializer_range", 0.02),
        "bos_id": next(iter(_token_ids(fields, "bos_token_id", vocab)), None),
        "pad_id": next(iter(_token_ids(fields, "pad_token_id", vocab)), None),
        "eos_ids": _token_ids(fields, "eos_token_id", vocab),
    }

    # 3. What this family has, which may overrule that.
    features |= family.read(fields)
    activation = fields.take(family.activation_field, "silu")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{where}: {family.activation_field} = {activation!r} is not supported; use one of {sorted(_ACTIVATIONS)}."
        )
    features["activation"] = _ACTIVATIONS[activation]

    # 4. Nothing may be left that nobody has read, or that this family's code does not read.
    fields.refuse_the_rest()
    if name != "ministral3" and any(kind.rope and kind.rope.query_beta for kind in features["kinds"]):
        raise UserError(f"{where}: llama_4_scaling_beta belongs to Ministral 3; remove it.")
    try:
        return DecoderConfig(**features)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def of_text(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the config of a vision-language model's text model; any other one as it is.

    Raises:
        UserError: it is one, but without the text model that its kind has.
    """
    fields = Fields(raw, where)
    known = WITH_EYES.get(str(fields.or_null("model_type")))
    if known is None:
        return raw
    text = fields.or_null("text_config") or {}
    wanted = text.get("model_type") or known[0]
    if wanted not in known:
        raise UserError(f"{where}: a text_config of model_type {wanted!r} is not supported; {' and '.join(known)} are.")
    # What ends an answer may stand outside alone; whether the head is the embedding is decided there, if it is said.
    ids, counts = ("bos_token_id", "eos_token_id", "pad_token_id"), ("tie_word_embeddings",)
    outside, deciding = ({name: raw[name] for name in names if raw.get(name) is not None} for names in (ids, counts))
    # A null inside says nothing against what is said outside.
    inside = {name: value for name, value in text.items() if value is not None or name not in outside}
    return {**outside, **inside, **deciding, "model_type": wanted}


def _token_ids(fields: Fields, name: str, vocab: int) -> tuple[int, ...]:
    """Return the ids of a field; null means none. Raises UserError for one past the vocabulary, never to be met."""
    value = fields.or_null(name)
    # Old files have -1 for "none".
    ids = tuple(one for one in (value if isinstance(value, list) else [value]) if one not in (None, -1))
    if name in fields.raw and any(one >= vocab for one in ids):
        raise UserError(f"{fields.where}: {name} is {value}, but the vocabulary has {vocab} tokens; mend it, or null.")
    return tuple(one for one in ids if one < vocab)  # a family's default may lie past a small vocabulary


def to_hf(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """Make the content of a config.json that transformers 4 and 5 both read; `from_hf` undoes it.

    Both spellings of the rotary parameters and of the dtype are written, since each version reads only its own.
    """
    # What every family has, then what is special in this one.
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
        **written_token_ids(config),
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **written_fields(config),
    }


def written_token_ids(config: DecoderConfig) -> dict[str, Any]:
    """Return the special ids as Hugging Face writes them: one end of sequence is a number, several are a list."""
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}
