"""config.json: both spellings, round trips, and refusals by name."""

from __future__ import annotations

import json

import jax
import pytest
from helpers.tiny import FAMILIES, HF_CONFIGS

from ctpd_jax.errors import UserError
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.hf.config import from_hf, read_config, to_hf

LLAMA, GEMMA = HF_CONFIGS["llama"], HF_CONFIGS["gemma3"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_round_trip(name):
    config = from_hf(FAMILIES[name])
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    assert hash(config) == hash(from_hf(FAMILIES[name]))


def test_old_and_new_spelling_of_rope_agree():
    scaling = HF_CONFIGS["llama_llama3_tied"]["rope_scaling"]
    old = from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    without = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    new = from_hf({**without, "rope_parameters": {"rope_theta": 5e5, **scaling}})
    assert old == new and old.kinds[0].rope.theta == 5e5 and old.kinds[0].rope.factor == 8.0
    without = {k: v for k, v in GEMMA.items() if not k.startswith("rope")}
    parameters = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    assert from_hf(GEMMA) == from_hf({**without, "rope_parameters": parameters})


def test_each_spelling_alone_survives_what_to_hf_writes():
    """A loader of either era that reads its own fields only gets the same model."""
    for name, config in ((name, from_hf(raw)) for name, raw in HF_CONFIGS.items()):
        written = to_hf(config)
        new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
        old = {k: v for k, v in written.items() if k != "rope_parameters"}
        assert from_hf(new) == config and from_hf(old) == config, name


def test_of_a_vision_language_model_the_text_model_is_read():
    # As Gemma 3 4B's: most of it is what transformers takes where nothing stands.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = from_hf({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text, "vision_config": {"x": 1}})
    assert (config.family, config.vocab_size, config.num_heads, config.head_dim) == ("gemma3_text", 262_208, 8, 256)
    assert config.eos_ids == (1, 106) and config.tied and config.kinds[-1].rope.factor == 8.0
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config))) == 3_880_263_168  # without the tower's
    mistral = {k: v for k, v in FAMILIES["mistral"].items() if k != "model_type"}
    assert from_hf({"model_type": "mistral3", "text_config": mistral}) == from_hf(FAMILIES["mistral"])
    inside = {**GEMMA, "eos_token_id": 7}
    assert from_hf({"model_type": "gemma3", "eos_token_id": 3, "text_config": inside}).eos_ids == (7,)
    # A null says nothing, on either side.
    nothing = {**GEMMA, "model_type": None, "eos_token_id": None, "tie_word_embeddings": False}
    config = from_hf({"model_type": "gemma3", "eos_token_id": 3, "tie_word_embeddings": None, "text_config": nothing})
    assert config.eos_ids == (3,) and not config.tied


def test_a_null_is_no_rope_where_a_family_has_a_default():
    """Ministral 3's is yarn: with a null for it the model would be another one, silently."""
    usual = {name: value for name, value in FAMILIES["ministral3"].items() if name != "rope_parameters"}
    (kind,) = from_hf(usual).kinds
    assert kind.rope.scaling == "yarn" and from_hf({**usual, "rope_parameters": None}).kinds == (kind,)
    stated = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    for old in ({"rope_scaling": stated}, {"rope_scaling": stated, "rope_parameters": None}):
        assert from_hf({**usual, **old}) == from_hf({**usual, "rope_parameters": stated})


def test_a_yarn_whose_scales_of_the_logarithm_are_zero_is_one_without_them():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for scales in ({"mscale": 1.0, "mscale_all_dim": 0.0}, {"mscale": 0, "mscale_all_dim": 0}, {"mscale": None}):
        assert from_hf({**LLAMA, "rope_scaling": yarn | scales}) == from_hf({**LLAMA, "rope_scaling": yarn})


def test_layers_of_exaone_without_positions_go_out_and_come_back():
    """None has a window, and none turns, since there is one that they might have."""
    config = from_hf({**FAMILIES["exaone4"], "layer_types": ["full_attention"] * 4, "sliding_window_pattern": "LLLG"})
    assert [kind.rope for kind in config.kinds] == [None] and from_hf(to_hf(config)) == config


@pytest.mark.parametrize("types", [["full_attention"] * 4, ["sliding_attention"] * 4])
def test_layers_of_one_kind_alone_go_out_and_come_back(types):
    for name in ("olmo3", "exaone4", "gemma3"):
        config = from_hf({**FAMILIES[name], "layer_types": types})
        assert len(config.kinds) == 1 and from_hf(to_hf(config)) == config


def test_ids_that_a_family_has_by_default_need_a_vocabulary_that_has_them():
    small = {name: value for name, value in FAMILIES["olmo3"].items() if not name.endswith("_token_id")}
    config = from_hf(small)
    assert (config.pad_id, config.eos_ids) == (1, ()) and from_hf(to_hf(config)) == config


def test_gemma_layer_pattern():
    config = from_hf({**GEMMA, "num_hidden_layers": 7, "sliding_window_pattern": 3})
    assert [config.kinds[kind].window for kind in config.layer_kinds] == [5, 5, None, 5, 5, None, 5]


@pytest.mark.parametrize(
    "raw, words",
    [
        ({**LLAMA, "model_type": "mamba"}, ["mamba", "not supported", "llama"]),
        ({k: v for k, v in LLAMA.items() if k != "model_type"}, ["model_type"]),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, ["vocab_size"]),
        ({"model_type": "gemma3", "text_config": {**GEMMA, "model_type": "llama"}}, ["text_config", "llama"]),
        ({"model_type": "gemma3", "text_config": GEMMA, "quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"model_type": "gemma3", "text_config": {**GEMMA, "quantization_config": {"x": 1}}}, ["quantization_config"]),
        (
            {
                "model_type": "gemma3",
                "quantization_config": {},
                "text_config": {**GEMMA, "quantization_config": {"x": 1}},
            },
            ["quantization_config"],
        ),
        ({"model_type": "gemma3", "text_config": [GEMMA]}, ["text_config", "an object"]),
        ({"model_type": "gemma3", "text_config": {"text_config": GEMMA, **GEMMA}}, ["text_config"]),
        ({"model_type": "gemma3_vision", "vision_config": {}}, ["gemma3_vision", "gemma3_text"]),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn"}}, ["factor"]),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}}, ["llama_4"]),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, ["truncate"]),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1}}, ["beta_fast"]),
        ({**LLAMA, "rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_theta", "above 1"]),
        ({**FAMILIES["olmo3"], "rope_parameters": {"sliding_attention": {"rope_theta": 2.0}}}, ["rope"]),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["dynamic"]),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, ["factor"]),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.5}}, ["mscale"]),
        ({**LLAMA, "hidden_act": "relu2"}, ["hidden_act", "relu2"]),
        ({**LLAMA, "attention_dropout": 0.1}, ["attention_dropout"]),
        ({**LLAMA, "partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({**LLAMA, "num_experts": 8}, ["num_experts"]),
        ({**LLAMA, "num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({**GEMMA, "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({**GEMMA, "layer_types": ["chunked_attention"] * 4}, ["chunked_attention"]),
        (
            {**FAMILIES["qwen2"], "layer_types": ["sliding_attention"] * FAMILIES["qwen2"]["num_hidden_layers"]},
            ["layer_types", "use_sliding_window"],
        ),
        ({**GEMMA, "layer_types": ["full_attention"]}, ["layer_types has 1 entries", "4 layers"]),
    ],
)
def test_refusals_name_the_field(raw, words):
    with pytest.raises(UserError) as error:
        from_hf(raw, where="some/config.json")
    assert all(word in str(error.value) for word in words)


def test_harmless_fields_are_accepted():
    extras = {
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "_name_or_path": "x",
        "transformers_version": "4.40",
        "new": None,
    }
    assert from_hf({**LLAMA, **extras}) == from_hf(LLAMA)


def test_read_config_adds_the_stop_tokens_of_the_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    assert read_config(tmp_path).eos_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 88]}))
    config = read_config(tmp_path)
    assert config.eos_ids == (1, 88)
    assert to_hf(config)["eos_token_id"] == [1, 88]


def test_read_config_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(tmp_path)
    for text, words in (
        ("{", r"config\.json is damaged .*line 1 column 2.*mend it"),
        ("[]", r"config\.json must hold"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_config(tmp_path)
