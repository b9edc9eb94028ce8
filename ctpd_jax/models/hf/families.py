"""What each family of models has: its fields of config.json, the features they mean, and its tensors' names.

A family is a `model_type` of Hugging Face, and a row of `FAMILIES`. The decoder itself knows features only: see
`models/config.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.hf import readers
from ctpd_jax.models.hf.fields import Fields, written_ropes

# ------------------------------------------------------------------------------------------------ writing


def written_fields(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields of config.json that the config's family has beside those of every family, in its order."""
    window = next((kind.window for kind in config.kinds if kind.window is not None), None)
    kinds = [config.kinds[kind] for kind in config.layer_kinds]
    scalar, share = config.attention_scale**-2, config.turned / config.head_dim
    # Where nobody has a window, such a field only says something else: Gemma's has a default, and EXAONE's layers turn
    # without it.
    unused = 4096 if config.family.startswith("gemma") or not (config.kinds[0].rope or len(config.kinds) > 1) else None
    # One value for every field that any family writes; the family's row picks its own.
    values = {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window or unused,
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
    read: Callable[[Fields], readers.Features]  # the features that are not those of a plain Llama
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
    "llama": Family("LlamaForCausalLM", readers.llama, f"mlp_bias attention_bias {_ROPE}"),
    "smollm3": Family(
        "SmolLM3ForCausalLM", readers.smollm3, f"mlp_bias attention_bias {_ROPE} {_WINDOWS} no_rope_layers"
    ),
    "mistral": Family("MistralForCausalLM", readers.mistral, f"sliding_window {_ROPE}"),
    "ministral3": Family("Ministral3ForCausalLM", readers.mistral, "sliding_window rope_parameters"),
    "granite": Family("GraniteForCausalLM", readers.granite, f"mlp_bias attention_bias {_ROPE} {_MULTIPLIERS}"),
    "qwen2": Family("Qwen2ForCausalLM", readers.qwen2, _QWEN),
    "qwen3": Family("Qwen3ForCausalLM", readers.qwen3, f"{_QWEN} attention_bias"),
    "gemma2": Family("Gemma2ForCausalLM", readers.gemma2, f"{_GEMMA} {_ROPE}", activation_field="hidden_activation"),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        readers.gemma3,
        f"{_GEMMA} rope_parameters rope_theta rope_local_base_freq rope_scaling",
        activation_field="hidden_activation",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        readers.phi3,
        f"{_ROPE} sliding_window original_max_position_embeddings partial_rotary_factor",
    ),
    "olmo2": Family("Olmo2ForCausalLM", readers.olmo2, f"attention_bias {_ROPE}"),
    "olmo3": Family("Olmo3ForCausalLM", readers.olmo3, f"attention_bias sliding_window layer_types {_ROPE}"),
    "exaone4": Family("Exaone4ForCausalLM", readers.exaone4, f"sliding_window layer_types {_ROPE}"),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        readers.neox,
        f"{_ROPE} attention_bias layer_norm_eps use_parallel_residual rotary_pct rotary_emb_base",
        _NEOX_NAMES,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        readers.mixtral,
        f"sliding_window {_ROPE} num_local_experts num_experts_per_tok",
        _MIXTRAL_NAMES,
        trainable=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        readers.qwen3_moe,
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
    "exaone4": {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2},
    "gpt_neox": {"hidden_act": "gelu", "attention_bias": True, "bos_token_id": 0, "eos_token_id": 2},
    "mixtral": {
        "max_position_embeddings": 131_072, "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen3_moe": {"max_position_embeddings": 32_768, "num_key_value_heads": 4},
}
# fmt: on
