"""The families of models that are supported: a row for each `model_type` of Hugging Face.

The decoder itself knows features only; see `config.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ctpd_jax.models import features
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.features import Features, Shape
from ctpd_jax.models.hf_fields import Fields


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    `read` gives the features that are not those of a plain Llama, `write` the fields of config.json that are not.
    """

    architecture: str
    read: Callable[[Fields, Shape], Features]
    write: Callable[[DecoderConfig], dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)  # of fields that config.json leaves out
    activation_field: str = "hidden_act"
    width_field: str = "intermediate_size"  # of the MLP, or of an expert
    trainable: bool = True


_IDS_OF_GEMMA = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", features.read_llama, features.write_llama, {"bos_token_id": 1, "eos_token_id": 2}
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        features.read_smollm3,
        features.write_smollm3,
        {
            "rope_theta": 2e6,
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        features.read_mistral,
        features.write_mistral,
        {
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        features.read_qwen2,
        features.write_qwen2,
        {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        features.read_qwen3,
        features.write_qwen3,
        {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        features.read_gemma2,
        features.write_gemma2,
        {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "final_logit_softcapping": 30.0,
            **_IDS_OF_GEMMA,
        },
        activation_field="hidden_activation",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        features.read_gemma3,
        features.write_gemma3,
        {
            "hidden_size": 2304,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            **_IDS_OF_GEMMA,
        },
        activation_field="hidden_activation",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        features.read_phi3,
        features.write_phi3,
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
        },
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        features.read_olmo2,
        features.write_olmo2,
        {"rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50_279},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        features.read_neox,
        features.write_neox,
        {"hidden_act": "gelu", "attention_bias": True, "bos_token_id": 0, "eos_token_id": 2},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        features.read_mixtral,
        features.write_mixtral,
        {
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        trainable=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        features.read_qwen3_moe,
        features.write_qwen3_moe,
        {"max_position_embeddings": 32_768, "num_key_value_heads": 4},
        width_field="moe_intermediate_size",
        trainable=False,
    ),
}
