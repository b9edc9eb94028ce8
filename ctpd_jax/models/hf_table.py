"""Which tensors of a Hugging Face checkpoint make which parameter: one table, followed by import, check and export."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import jax

from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, param_shapes

Path = tuple[str, ...]  # of a parameter: the keys on the way to it

EMBEDDING, HEAD = ("model", "embed_tokens", "weight"), ("lm_head", "weight")

# Parameters have Llama's names. A family that calls parts otherwise: our name -> the checkpoint's, whole words of both
# between dots; "{}" is the number of the expert.
_RENAMED: dict[str, dict[str, str]] = {
    "gpt_neox": {
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.layers": "gpt_neox.layers",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "self_attn.qkv_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    "mixtral": {
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.gate_proj": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.up_proj": "block_sparse_moe.experts.{}.w3",
        "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2",
    },
    "qwen3_moe": {"mlp.experts": "mlp.experts.{}"},
}


def tensor_table(config: DecoderConfig) -> dict[Path, str]:
    """Path in the parameter tree -> name in the checkpoint.

    A first "{}" in the name is the number of the layer, a second one that of the expert: such a parameter is the stack
    of all those tensors, [layers, ...] or [layers, experts, ...]. Adapters stand in neither.
    """
    return {path: checkpoint_name(config, path) for path in checkpoint_shapes(config)}


def checkpoint_name(config: DecoderConfig, path: Path) -> str:
    """What the family's checkpoints call the parameter, with "{}" as in `tensor_table`."""
    name = f".{'.'.join(path)}."
    for ours, theirs in _RENAMED.get(config.family, {}).items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace(".layers.", ".layers.{}.").strip(".")


def checkpoint_shapes(config: DecoderConfig) -> dict[Path, tuple[int, ...]]:
    """The parameters that a checkpoint holds, each with its shape, layers and experts stacked."""
    return {path: leaf.shape for path, leaf in leaves(param_shapes(replace(config, lora=None)))}


def leaves(tree: Params) -> Iterator[tuple[Path, Any]]:
    """Every leaf of a nested dict with its path."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield tuple(entry.key for entry in path), leaf


def places(config: DecoderConfig, entry: str) -> Iterable[tuple[int, ...]]:
    """Where the tensors of an entry lie in their stack: (layer,), (layer, expert), or () for what is not stacked."""
    return product(*(range(count) for count in (config.num_layers, config.experts)[: entry.count("{}")]))


def tensor_names(config: DecoderConfig, entry: str) -> list[str]:
    """All the tensors that an entry of the table stands for."""
    return [entry.format(*place) for place in places(config, entry)]
