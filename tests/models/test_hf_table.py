"""The names of every family's tensors, and that the table can be read in both directions."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers.tiny import FAMILIES, random_model

from ctpd_jax.models.hf import load_hf, safetensors, save_hf
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.models.hf.load import checkpoint_shapes, tensor_names, tensor_table

NEOX = {
    "model.embed_tokens.weight": "gpt_neox.embed_in.weight",
    "model.layers.input_layernorm.bias": "gpt_neox.layers.{}.input_layernorm.bias",
    "model.layers.post_attention_layernorm.weight": "gpt_neox.layers.{}.post_attention_layernorm.weight",
    "model.layers.self_attn.qkv_proj.weight": "gpt_neox.layers.{}.attention.query_key_value.weight",
    "model.layers.self_attn.qkv_proj.bias": "gpt_neox.layers.{}.attention.query_key_value.bias",
    "model.layers.self_attn.o_proj.weight": "gpt_neox.layers.{}.attention.dense.weight",
    "model.layers.mlp.up_proj.weight": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
    "model.layers.mlp.down_proj.bias": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
    "model.norm.bias": "gpt_neox.final_layer_norm.bias",
    "lm_head.weight": "embed_out.weight",
}
MIXTRAL = {
    "model.layers.mlp.gate.weight": "model.layers.{}.block_sparse_moe.gate.weight",
    "model.layers.mlp.experts.gate_proj.weight": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "model.layers.mlp.experts.up_proj.weight": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "model.layers.mlp.experts.down_proj.weight": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}
QWEN3_MOE = {
    "model.layers.mlp.gate.weight": "model.layers.{}.mlp.gate.weight",
    "model.layers.mlp.experts.gate_proj.weight": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "model.layers.self_attn.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
}
LLAMA = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.self_attn.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "lm_head.weight": "lm_head.weight",
}
NAMES = [("gpt_neox", NEOX), ("mixtral", MIXTRAL), ("qwen3_moe", QWEN3_MOE), ("llama", LLAMA)]


@pytest.mark.parametrize(("name", "expected"), NAMES, ids=[name for name, _ in NAMES])
def test_the_names_of_a_familys_checkpoints(name, expected):
    table = {".".join(path): entry for path, entry in tensor_table(from_hf(FAMILIES[name])).items()}
    assert {ours: table[ours] for ours in expected} == expected


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_tensor_has_one_name_and_one_place(name):
    config = from_hf(FAMILIES[name])
    table, shapes = tensor_table(config), checkpoint_shapes(config)
    names = [tensor for entry in table.values() for tensor in tensor_names(config, entry)]
    assert len(set(names)) == len(names)
    for path, entry in table.items():
        stacked = shapes[path][: entry.count("{}")]
        assert stacked == (config.num_layers, config.experts)[: len(stacked)]
        assert len(tensor_names(config, entry)) == np.prod(stacked, initial=1)
        assert ("layers" in path) == ("{}" in entry) and ("experts" in path) == (entry.count("{}") == 2)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_goes_out_and_comes_back_bit_for_bit(name, tmp_path):
    config, params = random_model(name)
    save_hf(tmp_path / "model", config, params, max_shard_bytes=15_000)
    loaded_config, loaded = load_hf(tmp_path / "model")
    assert loaded_config == config
    assert jax.tree.structure(params) == jax.tree.structure(loaded)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_an_expert_lies_where_its_name_says(tmp_path):
    config, params = random_model("mixtral")
    save_hf(tmp_path / "model", config, params)
    header = safetensors.read_header(tmp_path / "model" / "model.safetensors")
    stack = params["model"]["layers"]["mlp"]["experts"]["up_proj"]["weight"]
    for layer in range(config.num_layers):
        for expert in range(config.experts):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"
            assert safetensors.holds(header[name], name, np.asarray(stack[layer, expert]))


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    """GPT-NeoX stored causal masks and rotary frequencies beside its weights."""
    config, params = random_model("gpt_neox")
    save_hf(tmp_path / "model", config, params)
    file = tmp_path / "model" / "model.safetensors"
    tensors = {}
    for name, tensor in safetensors.read_header(file).items():
        tensors[name] = np.empty(tensor.shape, np.float32)
        safetensors.read_into(tensor, name, tensors[name])
    for layer in range(config.num_layers):
        for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq"):
            tensors[f"gpt_neox.layers.{layer}.attention.{buffer}"] = np.zeros(4, np.float32)
    entries = [(name, array.shape, array.dtype, lambda array=array: array) for name, array in tensors.items()]
    safetensors.write(file, entries)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "model")[1], params)
