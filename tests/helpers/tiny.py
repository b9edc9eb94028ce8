"""Small configs that use every feature between them, and parameters away from the identity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, param_shapes
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.schema import RowLayout

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "query_pre_attn_scalar": 20,
    "rms_norm_eps": 0.01,
    "sliding_window": 5,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA3 = {**_GEMMA, "model_type": "gemma3_text", "sliding_window_pattern": 2}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {  # of the other families; an epsilon large enough to be noticed
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.01,
    **_SPECIAL,
}
_QWEN2 = {"model_type": "qwen2", **_SIZES, "sliding_window": 5, "rope_theta": 2_000.0}
_QWEN3 = {**_QWEN2, "model_type": "qwen3", "head_dim": 12}
_PHI3 = {"model_type": "phi3", **_SIZES, "rope_theta": 3_000.0}
_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "layer_norm_eps": 0.01,
    "rotary_emb_base": 700.0,
    **_SPECIAL,
}
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 28,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

# Every family, with every field of its config.json that changes what is computed. Windows are shorter than the tests'
# sequences, caps low enough to bend, and the numbers are not the defaults.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "rope_theta": 20_000.0},
    "llama_llama3_tied": {
        **_LLAMA,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
        "rope_scaling": _LLAMA3_SCALING,
    },
    "llama_biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 12, "hidden_act": "gelu"},
    "llama_linear": {**_LLAMA, "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
    "llama_llama3": {**_LLAMA, "rope_parameters": {"rope_theta": 3_000.0, **_LLAMA3_SCALING}},
    "smollm2": {
        **_LLAMA,
        "hidden_size": 36,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 100_000.0,
        "rope_interleaved": False,
        "is_llama_config": True,
    },
    "smollm3": {
        "model_type": "smollm3",
        **_SIZES,
        "rope_theta": 5_000.0,
        "no_rope_layers": [0, 1, 1, 0],
        "tie_word_embeddings": True,
    },
    "smollm3_windows": {
        "model_type": "smollm3",
        **_SIZES,
        "rope_theta": 5_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "no_rope_layer_interval": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral": {"model_type": "mistral", **_SIZES, "head_dim": 12, "sliding_window": 5, "rope_theta": 3_000.0},
    "mistral_without_window": {
        "model_type": "mistral",
        **_SIZES,
        "sliding_window": None,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0},
    },
    "qwen2": {**_QWEN2, "use_sliding_window": False, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen2_windows": {**_QWEN2, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {**_QWEN3, "tie_word_embeddings": True},
    "qwen3_windows": {
        **_QWEN3,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "attention_bias": True,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "rope_theta": 2_000.0,
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 3.0,
    },
    "gemma2_biases": {
        "model_type": "gemma2",
        **_GEMMA,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 3_000.0, "rope_type": "linear", "factor": 2.0},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        **_GEMMA3,
        "rope_local_base_freq": 10_000.0,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_softcap_untied": {
        **_GEMMA3,
        "rope_local_base_freq": 300.0,
        "rope_theta": 5_000.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "phi3": {**_PHI3, "sliding_window": 5},
    "phi3_longrope": {
        **_PHI3,
        "num_attention_heads": 2,  # of a head's 16 dimensions 12 turn
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
        "tie_word_embeddings": True,
    },
    "phi3_attention_factor": {
        **_PHI3,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 3_000.0,
            "short_factor": [1.0, 1.2, 1.5, 2.0],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "attention_factor": 0.8,
        },
    },
    "olmo2": {"model_type": "olmo2", **_SIZES, "rope_theta": 50_000.0},
    "olmo2_biases": {
        "model_type": "olmo2",
        **_SIZES,
        "rope_theta": 900.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "olmo3": {
        "model_type": "olmo3",
        **_SIZES,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1.25,
            "beta_fast": 6.0,
            "beta_slow": 0.5,
            "original_max_position_embeddings": 64,
        },
        "sliding_window": 5,
    },
    "qwen3_yarn": {
        "model_type": "qwen3",
        **_SIZES,
        "head_dim": 10,
        "rope_theta": 900.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "granite": {
        "model_type": "granite",
        **_SIZES,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "ministral3": {
        "model_type": "ministral3",
        **_SIZES,
        "head_dim": 10,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 900.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "exaone4": {"model_type": "exaone4", **_SIZES, "sliding_window": 5, "rope_theta": 900.0},
    "exaone4_without_windows": {
        "model_type": "exaone4",
        **_SIZES,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 4,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "gpt_neox": {**_NEOX, "rotary_pct": 0.25, "use_parallel_residual": True},
    "gpt_neox_serial": {
        **_NEOX,
        "rotary_pct": 0.5,
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_SIZES,
        "head_dim": 12,
        "sliding_window": 5,
        "rope_theta": 3_000.0,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {**_QWEN3_MOE, "norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen3_moe_windows": {
        **_QWEN3_MOE,
        "norm_topk_prob": False,
        "attention_bias": True,
        "use_sliding_window": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}
TEACHERS = ("mixtral", "qwen3_moe", "qwen3_moe_windows")  # read and scored, not trained
# Those whose features the quick tests go through one by one.
HF_CONFIGS = {
    name: FAMILIES[name]
    for name in (
        "llama",
        "llama_llama3_tied",
        "llama_biases",
        "smollm3_windows",
        "gemma3",
        "gemma3_softcap_untied",
        "phi3_longrope",
        "olmo2",
        "olmo3",
        "gpt_neox",
        "mixtral",
    )
}
# The cap of the attention's scores is no part of Gemma 3 here: transformers has the field and does not apply it.
CONFIGS: dict[str, DecoderConfig] = {name: from_hf(raw) for name, raw in HF_CONFIGS.items()}
CONFIGS["gemma3_softcaps"] = replace(CONFIGS["gemma3_softcap_untied"], attention_softcap=0.7)


def random_model(name: str, seed: int = 0) -> tuple[DecoderConfig, Params]:
    """Every parameter random, norms and biases too, so that none can be left out without being noticed.

    Args:
        name: of CONFIGS, or else of FAMILIES.
    """
    config = CONFIGS[name] if name in CONFIGS else from_hf(FAMILIES[name])
    flat, tree = jax.tree.flatten_with_path(param_shapes(config))
    random = np.random.default_rng(seed)
    leaves = []
    for path, leaf in flat:
        norm = "norm" in path[-2].key and path[-1].key == "weight"
        noise = random.normal(size=leaf.shape, scale=0.3).astype(np.float32)
        leaves.append(jnp.asarray(noise + (1.0 - config.norm_offset if norm else 0.0)))
    return config, jax.tree.unflatten(tree, leaves)


def layout(segment: list[int], parent: list[int], positions: list[int]) -> RowLayout:
    """One row."""
    return RowLayout(*(jnp.asarray([values], jnp.int32) for values in (positions, segment, parent)))
