"""Hugging Face's config.json <-> DecoderConfig.

One function a family reads it, one writes it. Whatever in a config.json would change the computation and is not
understood here is refused by name; what cannot change it (`use_cache`, `transformers_version`) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.files import read_json
from ctpd_jax.models.config import DecoderConfig, LayerKind, Rope

_REQUIRED = object()

# Fields that do not change the logits: notes, training-time settings, and defaults of `generate`.
_HARMLESS = {
    "architectures",
    "auto_map",
    "cache_implementation",
    "chunk_size_feed_forward",
    "do_sample",
    "dtype",
    "finetuning_task",
    "id2label",
    "is_llama_config",
    "label2id",
    "max_length",
    "min_length",
    "num_beams",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
# Settings that the decoder has, in one value only. `rope_interleaved` means something in SmolLM's own code alone.
_FIXED = {
    "attention_dropout": 0.0,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


# ------------------------------------------------------------------------------------------------ reading


class _Fields:
    """config.json as a mapping that remembers what was asked for, so that the rest can be refused by name."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where, self.taken = raw, where, set[str]()

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field's value; a missing one, or null where there is a default, gives the default."""
        self.taken.add(name)
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise UserError(f"{self.where} has no field {name!r}: it is not a complete model config.")
        return default

    def refuse_the_rest(self) -> None:
        for name, value in self.raw.items():
            if name in self.taken or name.startswith("_") or value is None:
                continue
            if name in _FIXED:
                if value != _FIXED[name]:
                    raise UserError(
                        f"{self.where}: {name} = {value!r} is not supported; only {_FIXED[name]!r} is implemented."
                    )
            elif name not in _HARMLESS and value is not False:
                raise UserError(
                    f"{self.where}: the field {name!r} ({_short(value)}) is not supported and might change what the "
                    f"model computes. If it does not, remove it from config.json."
                )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


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
    fields = _Fields(raw, where)
    family = fields.take("model_type")
    if family == "llama":
        config = _read_llama(fields)
    elif family == "gemma3_text":
        config = _read_gemma3(fields)
    elif family == "gemma3":
        raise UserError(
            f"{where}: model_type 'gemma3' is the vision-language model (it has a vision_config); only the text model, "
            f"model_type 'gemma3_text', is supported."
        )
    else:
        raise UserError(f"{where}: model_type {family!r} is not supported; supported are 'llama' and 'gemma3_text'.")
    fields.refuse_the_rest()
    return config


def _read_llama(fields: _Fields) -> DecoderConfig:
    hidden, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    layers, positions = fields.take("num_hidden_layers"), fields.take("max_position_embeddings", 2048)
    head_dim = fields.take("head_dim", hidden // heads)
    scaling = fields.take("rope_parameters", None) or fields.take("rope_scaling", None)
    fields.taken.add("rope_scaling")
    attention_bias = fields.take("attention_bias", False)
    return DecoderConfig(
        family="llama",
        **_sizes(fields, heads),
        head_dim=head_dim,
        kinds=(LayerKind(_read_rope(scaling, fields.take("rope_theta", 10_000.0), positions, fields.where)),),
        layer_kinds=(0,) * layers,
        attention_scale=head_dim**-0.5,
        norm_eps=fields.take("rms_norm_eps", 1e-6),
        activation=_activation(fields, "hidden_act", "silu"),
        tied=fields.take("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=fields.take("mlp_bias", False),
        max_positions=positions,
        **_token_ids(fields, bos=1, eos=2, pad=None),
    )


def _read_gemma3(fields: _Fields) -> DecoderConfig:
    hidden, heads = fields.take("hidden_size", 2304), fields.take("num_attention_heads", 8)
    if fields.take("attn_logit_softcapping", None) is not None:
        # transformers reads the field and then ignores it for this family: no choice would be right for everybody.
        raise UserError(f"{fields.where}: attn_logit_softcapping of a Gemma 3 is not supported; set it to null.")
    layers, positions = fields.take("num_hidden_layers", 26), fields.take("max_position_embeddings", 131_072)
    head_dim = fields.take("head_dim", 256)
    pattern = fields.take("sliding_window_pattern", fields.raw.get("_sliding_window_pattern", 6))
    types = fields.take(
        "layer_types", ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    )
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UserError(f"{fields.where}: layer type {name!r} is not supported.")
    attention_bias = fields.take("attention_bias", False)
    return DecoderConfig(
        family="gemma3_text",
        **_sizes(fields, heads),
        head_dim=head_dim,
        kinds=_gemma3_kinds(fields, positions),
        layer_kinds=tuple(int(name == "full_attention") for name in types),
        attention_scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        norm_eps=fields.take("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        activation=_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        tied=fields.take("tie_word_embeddings", True),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        qk_norm=True,
        post_norms=True,
        embed_scale=float(hidden) ** 0.5,
        final_softcap=fields.take("final_logit_softcapping", None),
        max_positions=positions,
        **_token_ids(fields, bos=2, eos=1, pad=0),
    )


def _gemma3_kinds(fields: _Fields, positions: int) -> tuple[LayerKind, LayerKind]:
    """Sliding layers have a rotary base of their own; in the old spelling `rope_scaling` is the full layers' alone."""
    ropes = fields.take("rope_parameters", None) or {"full_attention": fields.raw.get("rope_scaling")}
    fields.taken.add("rope_scaling")
    theta = {
        "sliding_attention": fields.take("rope_local_base_freq", 10_000.0),
        "full_attention": fields.take("rope_theta", 1_000_000.0),
    }
    unknown = set(ropes) - set(theta)
    if unknown:
        raise UserError(f"{fields.where}: rope_parameters has {sorted(unknown)}; expected one entry per layer type.")
    sliding, full = (_read_rope(ropes.get(name), theta[name], positions, fields.where) for name in theta)
    return LayerKind(sliding, fields.take("sliding_window", 4096)), LayerKind(full)


def _sizes(fields: _Fields, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": fields.take("vocab_size"),
        "hidden_size": fields.take("hidden_size"),
        "intermediate_size": fields.take("intermediate_size"),
        "num_layers": fields.take("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.take("num_key_value_heads", heads),
        "initializer_range": fields.take("initializer_range", 0.02),
    }


def _token_ids(fields: _Fields, bos: int | None, eos: int | None, pad: int | None) -> dict[str, Any]:
    """A null in the file means "none"; only an absent field has the family's default."""
    bos = fields.raw.get("bos_token_id", bos)
    eos_ids = _ids(fields.raw.get("eos_token_id", eos))
    pad = fields.raw.get("pad_token_id", pad)
    fields.taken.update(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {"bos_id": bos, "eos_ids": eos_ids, "pad_id": pad}


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


def _activation(fields: _Fields, name: str, default: str) -> str:
    value = fields.take(name, default)
    if value not in _ACTIVATIONS:
        raise UserError(f"{fields.where}: {name} = {value!r} is not supported; use one of {sorted(_ACTIVATIONS)}.")
    return _ACTIVATIONS[value]


def _read_rope(raw: Mapping[str, Any] | None, theta: float, positions: int, where: str) -> Rope:
    fields = _Fields(raw or {}, f"{where}: rope parameters")
    theta = fields.take("rope_theta", theta)
    scaling = fields.take("rope_type", fields.take("type", "default"))
    if scaling == "default":
        rope = Rope(float(theta))
        fields.taken.add("factor")  # "default" does not read it
    elif scaling == "linear":
        rope = Rope(float(theta), scaling, float(fields.take("factor")))
    elif scaling == "llama3":
        rope = Rope(
            float(theta),
            scaling,
            float(fields.take("factor")),
            float(fields.take("low_freq_factor")),
            float(fields.take("high_freq_factor")),
            fields.take("original_max_position_embeddings", positions),
        )
    else:
        raise UserError(f"{where}: rope type {scaling!r} is not supported; supported are default, linear and llama3.")
    fields.refuse_the_rest()
    return rope


# ------------------------------------------------------------------------------------------------ writing


def to_hf(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """DecoderConfig -> the content of a config.json that transformers 4 and 5 both read; `from_hf` undoes it.

    Both spellings of the rotary parameters and of the dtype are written, since each version reads only its own.
    """
    raw: dict[str, Any] = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_field(config),
        "pad_token_id": config.pad_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.family == "llama":
        return raw | _write_llama(config)
    if config.family == "gemma3_text":
        return raw | _write_gemma3(config)
    raise UserError(f"A config of family {config.family!r} cannot be written; known are 'llama' and 'gemma3_text'.")


def eos_field(config: DecoderConfig) -> int | list[int] | None:
    """The end-of-sequence ids as Hugging Face writes them: a number if there is one, a list if there are several."""
    return config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    rope = config.kinds[0].rope
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "mlp_bias": config.mlp_bias,
        "rope_parameters": {"rope_theta": rope.theta, **_rope_scaling(rope)},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else _rope_scaling(rope),
    }


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    sliding, full = (kind.rope for kind in config.kinds)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": _HF_ACTIVATIONS[config.activation],
        "query_pre_attn_scalar": _integral(config.attention_scale**-2),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.final_softcap,
        "use_bidirectional_attention": False,
        "layer_types": ["full_attention" if kind else "sliding_attention" for kind in config.layer_kinds],
        "sliding_window": config.kinds[0].window,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": sliding.theta, **_rope_scaling(sliding)},
            "full_attention": {"rope_theta": full.theta, **_rope_scaling(full)},
        },
        "rope_theta": full.theta,
        "rope_local_base_freq": sliding.theta,
        "rope_scaling": None if full.scaling == "default" else _rope_scaling(full),
    }


def _rope_scaling(rope: Rope) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_type": rope.scaling}
    if rope.scaling != "default":
        raw["factor"] = rope.factor
    if rope.scaling == "llama3":
        raw["low_freq_factor"] = rope.low_freq_factor
        raw["high_freq_factor"] = rope.high_freq_factor
        raw["original_max_position_embeddings"] = rope.original_max_positions
    return raw


def _integral(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 else value
