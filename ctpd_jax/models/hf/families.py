"""What each family of models has: its fields of config.json, the features they mean, and its tensors' names.

A family is a `model_type` of Hugging Face, and a row of `FAMILIES`. The decoder itself knows features only: see
`models/config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig, LayerKind, Rope
from ctpd_jax.models.hf.fields import Entry, Fields, read_rope, rope_spellings, written_ropes

Features = dict[str, Any]  # arguments of DecoderConfig

# ------------------------------------------------------------------------------------------------ layers and ropes


def _layers(layers: Sequence[LayerKind]) -> Features:
    """Turn layers one by one into the distinct kinds, and the kind of each layer."""
    kinds = tuple(dict.fromkeys(layers))
    return {"kinds": kinds, "layer_kinds": tuple(kinds.index(layer) for layer in layers)}


def _alike(fields: Fields, layer: LayerKind) -> Features:
    return _layers([layer] * fields.take("num_hidden_layers"))


def _windows(fields: Fields, default: Sequence[bool], window: int | None) -> list[int | None]:
    """Return each layer's window by `layer_types`; by `default`, which layers have one, where the file has none."""
    types = fields.take("layer_types", ["sliding_attention" if one else "full_attention" for one in default])
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UserError(f"{fields.where}: layer type {name!r} is not supported.")
    if len(types) != len(default):
        raise UserError(f"{fields.where}: layer_types has {len(types)} entries for {len(default)} layers.")
    if window is None and "sliding_attention" in types:
        raise UserError(
            f"{fields.where}: layer_types names layers with a window, but there is none (sliding_window, "
            f"use_sliding_window)."
        )
    return [window if name == "sliding_attention" else None for name in types]


def _window_if_used(fields: Fields, default: int | None = 4096) -> int | None:
    """Return the window of families that have one only with `use_sliding_window`."""
    window = fields.or_null("sliding_window", default) if fields.take("use_sliding_window", False) else None
    fields.ignore("sliding_window", "max_window_layers")
    return window


def _biases(fields: Fields) -> Features:
    bias = fields.take("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias}


def _turned(fields: Fields, ropes: Sequence[Entry], name: str, default: float) -> int | None:
    """Return how many dimensions of a head turn: a share in the rotary parameters, or beside them as `name`.

    Raises:
        UserError: it stands in several places, and differs.
    """
    inside = [Fields(rope, fields.where).or_null("partial_rotary_factor") for rope in ropes if rope]
    stated = [share for share in (*inside, fields.or_null(name)) if share is not None] or [default]
    # Beside them, transformers reads no other name: what stands there must be the same.
    shares = {*stated, fields.take("partial_rotary_factor", stated[0])}
    if len(shares) > 1:
        raise UserError(
            f"{fields.where}: {name} and the partial_rotary_factor of the rotary parameters differ: {sorted(shares)}."
        )
    head_dim = fields.take("hidden_size") // fields.take("num_attention_heads")
    if fields.take("head_dim", head_dim) != head_dim:
        raise UserError(f"{fields.where}: a head_dim other than hidden_size / num_attention_heads is not supported.")
    turned = int(head_dim * shares.pop())
    return None if turned == head_dim else turned


def _without_share(ropes: tuple[Entry, Entry]) -> tuple[Entry, Entry]:
    new, old = (rope and {key: rope[key] for key in rope if key != "partial_rotary_factor"} for rope in ropes)
    return new, old


# ------------------------------------------------------------------------------------------------ readers


def _llama(fields: Fields) -> Features:
    layers = _alike(fields, LayerKind(read_rope(fields)))
    return layers | _biases(fields) | {"mlp_bias": fields.take("mlp_bias", False)}


def _smollm3(fields: Fields) -> Features:
    """Every fourth layer has no positions; with `use_sliding_window` these layers also have a window."""
    rope, interval, count = (
        read_rope(fields),
        fields.take("no_rope_layer_interval", 4),
        fields.take("num_hidden_layers"),
    )
    turned = fields.take("no_rope_layers", [(i + 1) % interval != 0 for i in range(count)])  # 1: has positions
    window = _window_if_used(fields, None)
    windows = _windows(fields, [window is not None and not one for one in turned], window)
    layers = _layers([LayerKind(rope if one else None, window) for one, window in zip(turned, windows)])
    return layers | _biases(fields) | {"mlp_bias": fields.take("mlp_bias", False)}


def _mistral(fields: Fields) -> Features:
    return _alike(fields, LayerKind(read_rope(fields), fields.or_null("sliding_window")))


def _granite(fields: Fields) -> Features:
    """Llama with a factor for what is embedded, attended to, added, and unembedded."""
    return _llama(fields) | {
        "embed_scale": float(fields.take("embedding_multiplier", 1.0)),
        "attention_scale": float(fields.take("attention_multiplier", 1.0)),
        "residual_scale": float(fields.take("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / fields.take("logits_scaling", 1.0),
    }


def _qwen2(fields: Fields) -> Features:
    """The layers from `max_window_layers` on have a window, if windows are used at all."""
    rope, first = read_rope(fields), fields.take("max_window_layers", 28)
    window = _window_if_used(fields)
    default = [window is not None and i >= first for i in range(fields.take("num_hidden_layers"))]
    return _layers([LayerKind(rope, one) for one in _windows(fields, default, window)]) | {"qkv_bias": True}


def _qwen3(fields: Fields) -> Features:
    return _qwen2(fields) | _biases(fields) | {"qk_norm": "head"}


def _gemma(fields: Fields) -> Features:
    fields.ignore("hidden_act", "sliding_window_size")  # stand in the files, and are not read for this family
    return _biases(fields) | {
        "attention_scale": fields.take("query_pre_attn_scalar", 256) ** -0.5,
        "norm_offset": 1.0,
        "post_norms": True,
        "embed_scale": float(fields.take("hidden_size")) ** 0.5,
        "final_softcap": fields.or_null("final_logit_softcapping"),
    }


def _gemma2(fields: Fields) -> Features:
    rope, window = read_rope(fields), fields.or_null("sliding_window", 4096)
    windows = _windows(fields, [i % 2 == 0 for i in range(fields.take("num_hidden_layers"))], window)
    layers = _layers([LayerKind(rope, one) for one in windows])
    return layers | _gemma(fields) | {"attention_softcap": fields.or_null("attn_logit_softcapping", 50.0)}


def _gemma3(fields: Fields) -> Features:
    """Sliding layers have a rotary base of their own; in the old spelling `rope_scaling` is the full layers' alone."""
    if fields.take("attn_logit_softcapping", None) is not None:
        # transformers reads the field and then ignores it for this family: no choice would be right for everybody.
        raise UserError(f"{fields.where}: attn_logit_softcapping of a Gemma 3 is not supported; set it to null.")
    # In the old spelling either kind of layer has a base; every sixth sees everything.
    ropes = _ropes_by_layer(fields, "rope_local_base_freq", 10_000.0, 1_000_000.0)
    layers = _every_nth_sees_all(fields, *ropes, fields.take("sliding_window_pattern", 6))
    return layers | _gemma(fields) | {"qk_norm": "head"}


def _ropes_by_layer(fields: Fields, local_name: str, local_theta: float, full_theta: float) -> tuple[Rope, Rope]:
    """Return the ropes of sliding and of full layers; `local_name` is where the old spelling has the former's base."""
    # 1. The rotary parameters, one entry for each kind of layer.
    new, old = rope_spellings(fields)
    if unknown := set(new or {}) - {"sliding_attention", "full_attention"}:
        raise UserError(f"{fields.where}: rope_parameters has {sorted(unknown)}; expected one entry per layer type.")
    by_layer = Fields(new or {}, f"{fields.where}: rope_parameters")
    local, full = by_layer.or_null("sliding_attention"), by_layer.or_null("full_attention")
    if new and not full:  # an entry that says nothing still stands against `rope_scaling`
        full = {"rope_type": "default"}
    # 2. Each held against the old spelling, whose scaling is that of the full ones.
    local_rope = read_rope(fields, (local, None), local_name, local_theta)
    return local_rope, read_rope(fields, (full, old), theta=full_theta)


def _every_nth_sees_all(fields: Fields, local: Rope, full: Rope, n: int) -> Features:
    window = fields.or_null("sliding_window", 4096)
    windows = _windows(fields, [(i + 1) % n != 0 for i in range(fields.take("num_hidden_layers"))], window)
    return _layers([LayerKind(full if one is None else local, one) for one in windows])


def _phi3(fields: Fields) -> Features:
    # The share of a head that turns stands among the rotary parameters, or beside them.
    spellings, original = rope_spellings(fields), fields.take("original_max_position_embeddings")
    rope = read_rope(fields, _without_share(spellings), original=original)
    rotary_dim = _turned(fields, spellings, "partial_rotary_factor", 1.0)
    half = (rotary_dim or fields.take("hidden_size") // fields.take("num_attention_heads")) // 2
    if rope.scaling == "longrope" and not len(rope.short_factor) == len(rope.long_factor) == half:
        raise UserError(f"{fields.where}: short_factor and long_factor must have {half} entries each.")
    layers = _alike(fields, LayerKind(rope, fields.or_null("sliding_window")))
    return layers | {"rotary_dim": rotary_dim, "fused_qkv": "blocks", "fused_mlp": True}


def _olmo2(fields: Fields) -> Features:
    layers = _alike(fields, LayerKind(read_rope(fields)))
    return layers | _biases(fields) | {"pre_norms": False, "post_norms": True, "qk_norm": "all"}


def _olmo3(fields: Fields) -> Features:
    """OLMo 2 with windows; every fourth layer sees everything, and its rope alone is scaled."""
    local, full = _ropes_by_layer(fields, "rope_theta", 500_000.0, 500_000.0)
    if local.scaling != "default" or local.theta != full.theta:
        # Version 4 of transformers has one base for both, and no scaling of the sliding layers.
        raise UserError(f"{fields.where}: OLMo 3 with another rope in its sliding layers is not supported.")
    layers = _every_nth_sees_all(fields, local, full, 4)
    return layers | _biases(fields) | {"pre_norms": False, "post_norms": True, "qk_norm": "all"}


def _neox(fields: Fields) -> Features:
    spellings = rope_spellings(fields)
    rope = read_rope(fields, _without_share(spellings), "rotary_emb_base")
    # Its base has another name; one that stands under the usual name may only repeat it.
    if fields.take("rope_theta", rope.theta) != rope.theta:
        raise UserError(f"{fields.where}: rope_theta is not read for this family, and differs from the base that is.")
    features = _alike(fields, LayerKind(rope)) | _biases(fields)
    return features | {
        "mlp_bias": True,
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps", 1e-5),
        "parallel": fields.take("use_parallel_residual", True),
        "rotary_dim": _turned(fields, spellings, "rotary_pct", 0.25),
        "fused_qkv": "heads",
        "gated": False,
    }


def _mixtral(fields: Fields) -> Features:
    experts = {"experts": fields.take("num_local_experts", 8)}
    return _mistral(fields) | experts | {"experts_per_token": fields.take("num_experts_per_tok", 2)}


def _qwen3_moe(fields: Fields) -> Features:
    # Some files have the number of experts under Mixtral's name.
    experts = fields.take("num_experts", fields.take("num_local_experts", 128))
    if fields.take("num_local_experts", experts) != experts:
        raise UserError(f"{fields.where}: num_experts and num_local_experts differ; remove one.")
    if fields.take("decoder_sparse_step", 1) != 1 or fields.take("mlp_only_layers", []):
        raise UserError(
            f"{fields.where}: layers without experts among layers with them (decoder_sparse_step, mlp_only_layers) are "
            f"not supported."
        )
    window = _window_if_used(fields)
    fields.ignore("intermediate_size")
    layers = _alike(fields, LayerKind(read_rope(fields), window))
    mixture = {"experts": experts, "experts_per_token": fields.take("num_experts_per_tok", 8)}
    mixture["normalize_experts"] = fields.take("norm_topk_prob", False)
    return layers | _biases(fields) | mixture | {"qk_norm": "head"}


# ------------------------------------------------------------------------------------------------ writing


def written_fields(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields of config.json that the config's family has beside those of every family, in its order."""
    window = next((kind.window for kind in config.kinds if kind.window is not None), None)
    kinds = [config.kinds[kind] for kind in config.layer_kinds]
    scalar, share = config.attention_scale**-2, config.turned / config.head_dim
    # One value for every field that any family writes; the family's row picks its own.
    values = {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window or (4096 if config.family.startswith("gemma") else None),
        "max_window_layers": config.num_layers,
        "layer_types": ["full_attention" if kind.window is None else "sliding_attention" for kind in kinds],
        "no_rope_layers": [int(kind.rope is not None) for kind in kinds],
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "final_logit_softcapping": config.final_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "use_bidirectional_attention": False,
        "partial_rotary_factor": share,
        "rotary_pct": share,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.experts,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalize_experts,
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": config.attention_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1.0 / config.logit_scale,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **written_ropes(config, share),
    }
    return {name: values[name] for name in FAMILIES[config.family].writes.split()}


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    architecture: str
    read: Callable[[Fields], Features]  # the features that are not those of a plain Llama
    writes: str  # the fields of config.json that `written_fields` gives, in order
    renamed: dict[str, str] = field(default_factory=dict)  # Llama's name of a part -> that of the family's checkpoints
    activation_field: str = "hidden_act"
    width_field: str = "intermediate_size"  # of the MLP, or of an expert
    trainable: bool = True


_ROPE = "rope_parameters rope_theta rope_scaling"
_MULTIPLIERS = "embedding_multiplier attention_multiplier residual_multiplier logits_scaling"
_WINDOWS = "use_sliding_window sliding_window layer_types"
_QWEN = f"{_WINDOWS} max_window_layers {_ROPE}"
_GEMMA = (
    "attention_bias query_pre_attn_scalar final_logit_softcapping use_bidirectional_attention layer_types "
    "sliding_window attn_logit_softcapping"
)
# Parameters have Llama's names. `renamed` goes by whole words between dots; "{}" is the number of the expert.
_NEOX_NAMES = {
    "model.embed_tokens": "gpt_neox.embed_in",
    "model.layers": "gpt_neox.layers",
    "model.norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "self_attn.qkv_proj": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_MIXTRAL_NAMES = {
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts.gate_proj": "block_sparse_moe.experts.{}.w1",
    "mlp.experts.up_proj": "block_sparse_moe.experts.{}.w3",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2",
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama, f"mlp_bias attention_bias {_ROPE}"),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, f"mlp_bias attention_bias {_ROPE} {_WINDOWS} no_rope_layers"),
    "mistral": Family("MistralForCausalLM", _mistral, f"sliding_window {_ROPE}"),
    "ministral3": Family("Ministral3ForCausalLM", _mistral, "sliding_window rope_parameters"),
    "granite": Family("GraniteForCausalLM", _granite, f"mlp_bias attention_bias {_ROPE} {_MULTIPLIERS}"),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _QWEN),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, f"{_QWEN} attention_bias"),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, f"{_GEMMA} {_ROPE}", activation_field="hidden_activation"),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        f"{_GEMMA} rope_parameters rope_theta rope_local_base_freq rope_scaling",
        activation_field="hidden_activation",
    ),
    "phi3": Family(
        "Phi3ForCausalLM", _phi3, f"{_ROPE} sliding_window original_max_position_embeddings partial_rotary_factor"
    ),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, f"attention_bias {_ROPE}"),
    "olmo3": Family("Olmo3ForCausalLM", _olmo3, f"attention_bias sliding_window layer_types {_ROPE}"),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _neox,
        f"{_ROPE} attention_bias layer_norm_eps use_parallel_residual rotary_pct rotary_emb_base",
        _NEOX_NAMES,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        f"sliding_window {_ROPE} num_local_experts num_experts_per_tok",
        _MIXTRAL_NAMES,
        trainable=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        f"{_ROPE} attention_bias moe_intermediate_size num_experts num_experts_per_tok norm_topk_prob "
        "decoder_sparse_step mlp_only_layers use_sliding_window sliding_window",
        {"mlp.experts": "mlp.experts.{}"},
        width_field="moe_intermediate_size",
        trainable=False,
    ),
}

# Vision-language models whose text model is one of those: model_type -> those that a text_config may have, the usual
# one first. Of their weights the text model's alone are read.
WITH_EYES = {"gemma3": ("gemma3_text",), "mistral3": ("mistral", "ministral3")}

# What a family's config.json may leave out, as in transformers, where that is not the default of every family.
# fmt: off
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "smollm3": {
        "rope_theta": 2e6, "max_position_embeddings": 32_768, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "bos_token_id": 128_000, "eos_token_id": 128_001, "pad_token_id": 128_004,
    },
    "mistral": {
        "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "ministral3": {
        "max_position_embeddings": 262_144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    },
    "granite": {"bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma2": {
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": 30.0,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
    "gemma3_text": {
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "max_position_embeddings": 131_072, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
    "phi3": {
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 32_000, "pad_token_id": 32_000,
    },
    "olmo2": {"rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50_279},
    "olmo3": {"rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50_279},
    "gpt_neox": {"hidden_act": "gelu", "attention_bias": True, "bos_token_id": 0, "eos_token_id": 2},
    "mixtral": {
        "max_position_embeddings": 131_072, "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen3_moe": {"max_position_embeddings": 32_768, "num_key_value_heads": 4},
}
# fmt: on
