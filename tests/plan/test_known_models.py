"""The configs of public models that the plan brings along: read as a folder's, and as large as they are published."""

import json
from pathlib import Path

import jax
import pytest

import ctpd_jax
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.hf.config import read_config

FILE = Path(ctpd_jax.__file__).parent / "plan" / "known_models.json"
KNOWN = json.loads(FILE.read_text())
# What the hub tells of their safetensors.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "google/gemma-2-9b": 9_241_705_984,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_is_read_and_has_the_published_size(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN[name]))
    config = read_config(tmp_path)
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
    assert count == PUBLISHED[name.replace("-Instruct", "").removesuffix("-it")]


def test_what_a_count_of_parameters_does_not_see():
    one, eight = KNOWN["meta-llama/Llama-3.2-1B"], KNOWN["meta-llama/Llama-3.1-8B"]
    assert (one["rope_scaling"]["factor"], eight["rope_scaling"]["factor"]) == (32.0, 8.0)
    assert KNOWN["google/gemma-2-9b"]["query_pre_attn_scalar"] == 256  # 224 was a mistake, mended in July 2024
    assert KNOWN["mistralai/Mistral-7B-v0.3"]["sliding_window"] is None
    assert not any(raw.get("use_sliding_window") for raw in KNOWN.values())
    assert [KNOWN[f"Qwen/Qwen2.5-14B{kind}"]["rms_norm_eps"] for kind in ("", "-Instruct")] == [1e-5, 1e-6]
