"""Exports of the real models open with transformers 4 and 5, which find each other's logits and ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import HELPERS, real_assets
from helpers.tiny import FAMILIES, random_model
from tokenizers import Tokenizer

from ctpd_jax.models.decoder import apply
from ctpd_jax.models.hf import load_hf, save_hf

pytestmark = pytest.mark.slow
SCRIPT = HELPERS / "torch_reference.py"
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


# ------------------------------------------------------------------------------------------------ tokenizers

# (tokenizer, the class that its folder names, the exported model's family, what is changed in tokenizer.json)
TOKENIZERS = [
    ("llama3", "TokenizersBackend", "llama", {}),
    ("llama3", "GPT2Tokenizer", "llama", {}),
    ("llama3", "GPT2Tokenizer", "phi3", {}),
    ("llama3", "Qwen2Tokenizer", "qwen3", {}),
    ("qwen2.5", "Qwen2Tokenizer", "qwen2", {}),
    ("qwen2.5", "TokenizersBackend", "olmo2", {}),
    ("deepseek", "LlamaTokenizer", "llama", {}),
    ("mistral-v0.1", "LlamaTokenizer", "mistral", {}),
    ("mistral-v0.1", "TokenizersBackend", "mixtral", {}),
    ("smollm2", "GPT2Tokenizer", "smollm3", {}),
    ("smollm2", "GPTNeoXTokenizer", "gpt_neox", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}),
    ("gemma3", "GemmaTokenizer", "gemma3", {}),
]


def _texts():
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    odd = ["", " ", "x.cat 1234567 don't DON'T", "\r\n\r\n a\t\tb", "e\u0301 \u00a0\u2003 你好 ﬁ", "👩‍👩‍👧 ٣٤٥ naïve"]
    control = ["<|im_start|>user\nhi<|im_end|>\n", "<|begin_of_text|>x<|eot_id|>", "<s>[INST] a [/INST]</s>"]
    control += [
        "<｜User｜>hi<｜Assistant｜><think>",
        "<start_of_turn>user\n<end_of_turn>",
        "<|endoftext|> a<|endoftext|>",
    ]
    return [*odd, *control, *(text[i : i + 150] for i in range(0, 13_200, 150))]


@pytest.fixture(scope="module")
def tokenized(real_tokenizers, tmp_path_factory):
    """Of each of TOKENIZERS: the ids by tokenizer.json, and by AutoTokenizer of both versions for the export."""
    root, texts = tmp_path_factory.mktemp("tokenizers"), _texts()
    assert len(texts) == 100
    expected, jobs = [], []
    for number, (name, kind, family, changed) in enumerate(TOKENIZERS):
        source = root / f"source{number}"
        source.mkdir()
        core = json.loads((real_tokenizers[name] / "tokenizer.json").read_text()) | changed
        if changed:
            core["pre_tokenizer"] |= {"trim_offsets": True, "use_regex": True}
        (source / "tokenizer.json").write_text(json.dumps(core))
        settings = json.loads((real_tokenizers[name] / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}
        settings["extra_special_tokens"] = [settings["eos_token"]]
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        save_hf(root / str(number), *random_model(family), tokenizer=source)
        assert (root / str(number) / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        reader = Tokenizer.from_file(str(source / "tokenizer.json"))
        expected.append([[reader.encode(text, add_special_tokens=add).ids for add in (False, True)] for text in texts])
        jobs.append({"ids": str(root / str(number)), "texts": texts})
    found = {}
    for version in (4, 5):
        outs = [root / f"{number}-{version}.json" for number in range(len(jobs))]
        (root / "jobs.json").write_text(json.dumps([job | {"out": str(out)} for job, out in zip(jobs, outs)]))
        real_assets.run_in_assets_venv(SCRIPT, root / "jobs.json", transformers4=version == 4)
        found[version] = [json.loads(out.read_text()) for out in outs]
    return expected, found


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("number", range(len(TOKENIZERS)), ids=["-".join(row[:3]) for row in TOKENIZERS])
def test_both_versions_find_the_ids_of_tokenizer_json(tokenized, number, version):
    expected, found = tokenized
    assert found[version][number] == expected[number]


def test_version_4_finds_our_logits_for_every_family(tmp_path):
    """As test_torch_parity.py has it for version 5."""
    jobs, ours = [], {}
    # A factor that version 4 refuses by name, and a family that it does not know.
    for name in sorted(FAMILIES.keys() - {"phi3_attention_factor", "ministral3"}):
        config, params = random_model(name)
        save_hf(tmp_path / name, config, params)
        tokens = [np.random.default_rng(0).integers(3, config.vocab_size, 24).tolist()]
        ours[name] = np.asarray(apply(config, params, np.array(tokens)))[0]
        jobs.append({"logits": str(tmp_path / name), "tokens": tokens, "out": str(tmp_path / f"{name}.npz")})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    real_assets.run_in_assets_venv(SCRIPT, tmp_path / "jobs.json", transformers4=True)
    for name, logits in ours.items():
        theirs = np.load(tmp_path / f"{name}.npz")["0"]
        assert np.abs(theirs - logits).max() <= 1e-4 * np.abs(theirs).max(), name
