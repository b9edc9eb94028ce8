"""Exports of the real models open with transformers 4 and 5, which find each other's logits and ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import real_assets
from tokenizers import Tokenizer

from ctpd_jax.models.decoder import apply
from ctpd_jax.models.hf import load_hf, save_hf

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("torch_reference.py")
REAL = ["smollm2-135m-instruct", "gemma3-270m"]
TOKENS = 48  # of each of two sequences


@pytest.fixture(scope="module")
def opened(real_models, tmp_path_factory):
    """Of each model: the exported folder, the tokens, and logits by version of transformers."""
    root = tmp_path_factory.mktemp("exports")
    tokens, found = {}, {name: {} for name in REAL}
    for name in REAL:
        config, params = load_hf(real_models[name], dtype="bfloat16")
        save_hf(root / name, config, params, tokenizer=real_models[name], max_shard_bytes=100_000_000)
        assert len(list((root / name).glob("model-*.safetensors"))) > 1
        text = Path(argparse.__file__).read_text(encoding="utf-8")
        ids = Tokenizer.from_file(str(root / name / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        tokens[name] = [ids[:TOKENS], ids[1000 : 1000 + TOKENS]]
    for version in (4, 5):
        jobs = [
            {"logits": str(root / name), "tokens": tokens[name], "out": str(root / f"{name}-{version}.npz")}
            for name in REAL
        ]
        (root / "jobs.json").write_text(json.dumps(jobs))
        real_assets.run_in_assets_venv(SCRIPT, root / "jobs.json", transformers4=version == 4)
        for name in REAL:
            found[name][version] = np.load(root / f"{name}-{version}.npz")
    return root, tokens, found


def test_the_two_versions_are_what_they_are_called(tmp_path):
    script = tmp_path / "version.py"
    script.write_text("import transformers; print(transformers.__version__)")
    assert real_assets.run_in_assets_venv(script, transformers4=True).startswith("4.")
    assert real_assets.run_in_assets_venv(script).startswith("5.")


@pytest.mark.parametrize("name", REAL)
def test_both_versions_find_our_logits(opened, name):
    root, tokens, found = opened
    config, params = load_hf(root / name)
    ours = np.asarray(apply(config, params, np.array(tokens[name])))
    assert np.abs(found[name][5]["0"]).max() > 1
    for i in range(len(tokens[name])):
        four, five = found[name][4][str(i)], found[name][5][str(i)]
        assert four.shape == (TOKENS, config.vocab_size)
        np.testing.assert_array_equal(four, five)
        print(f"{name}: largest logit {np.abs(four).max():.1f}, largest difference {np.abs(four - ours[i]).max():.1e}")
    # Of the opening of the text. Later in it are tokens where rounding in float32 alone moves Gemma's logits by more.
    assert np.abs(found[name][4]["0"] - ours[0]).max() <= 1e-5 * np.abs(found[name][4]["0"]).max()
    for i in range(len(tokens[name])):
        np.testing.assert_allclose(_logprobs(ours[i]), _logprobs(found[name][4][str(i)]), atol=2e-3)


def _logprobs(logits):
    """Of every token of the vocabulary."""
    return logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)


@pytest.mark.parametrize("name", REAL)
def test_the_config_is_spelled_for_both(opened, name):
    raw = json.loads((opened[0] / name / "config.json").read_text())
    assert raw["torch_dtype"] == raw["dtype"] == "bfloat16"
    new = raw["rope_parameters"]
    assert raw["rope_theta"] == new.get("full_attention", new)["rope_theta"]
    if name.startswith("gemma3"):
        assert raw["rope_local_base_freq"] == new["sliding_attention"]["rope_theta"]
