"""Small configs that use every feature between them, and parameters away from the identity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, param_shapes
from ctpd_jax.models.hf_config import from_hf
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
    "model_type": "gemma3_text",
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_llama3_tied": {
        **_LLAMA,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 12, "hidden_act": "gelu"},
    "llama_linear": {**_LLAMA, "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
    "gemma3": {
        **_GEMMA,
        "rope_local_base_freq": 10_000.0,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_softcap_untied": {**_GEMMA, "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
}
# The cap of the attention's scores is no part of HF_CONFIGS: transformers' Gemma 3 has the field and does not apply it.
CONFIGS: dict[str, DecoderConfig] = {name: from_hf(raw) for name, raw in HF_CONFIGS.items()}
CONFIGS["gemma3_softcaps"] = replace(CONFIGS["gemma3_softcap_untied"], attention_softcap=0.7)


def random_model(name: str, seed: int = 0) -> tuple[DecoderConfig, Params]:
    """Every parameter random, norms and biases too, so that none can be left out without being noticed."""
    config = CONFIGS[name]
    flat, tree = jax.tree.flatten_with_path(param_shapes(config))
    random = np.random.default_rng(seed)
    leaves = []
    for path, leaf in flat:
        norm = any("norm" in entry.key for entry in path)
        noise = random.normal(size=leaf.shape, scale=0.3).astype(np.float32)
        leaves.append(jnp.asarray(noise + (1.0 - config.norm_offset if norm else 0.0)))
    return config, jax.tree.unflatten(tree, leaves)


def layout(segment: list[int], parent: list[int], positions: list[int]) -> RowLayout:
    """One row."""
    return RowLayout(*(jnp.asarray([values], jnp.int32) for values in (positions, segment, parent)))
