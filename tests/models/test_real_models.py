"""The two real models against transformers and torch in float32.

Slow: torch runs in an environment of its own, and the models are made from packages the first time.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import HELPERS, real_assets
from tokenizers import Tokenizer

from ctpd_jax.models.decoder import apply, hidden_states, logits_of
from ctpd_jax.models.hf import load_hf, safetensors, save_hf
from ctpd_jax.models.sampling import generate

pytestmark = pytest.mark.slow
SCRIPT = HELPERS / "torch_reference.py"
REAL = ["smollm2-135m-instruct", "gemma3-270m"]
LOGPROB_TOLERANCE = 1e-3
GREEDY = (40, 64)  # prompt, new tokens


def _run(jobs, folder):
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    real_assets.run_in_assets_venv(SCRIPT, file)


def _text_ids(folder):
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids[:2048]


@pytest.fixture(scope="module")
def scored(real_models, tmp_path_factory):
    root = tmp_path_factory.mktemp("scored")
    jobs = [
        {
            "score": str(real_models[name]),
            "tokens": _text_ids(real_models[name]),
            "greedy": GREEDY,
            "out": str(root / f"{name}.npz"),
        }
        for name in REAL
    ]
    _run(jobs, root)
    return root


@pytest.mark.parametrize("name", REAL)
def test_real_models_agree_with_torch(real_models, scored, name):
    config, params = load_hf(real_models[name])
    ids = np.array(_text_ids(real_models[name]), np.int32)
    expected = np.load(scored / f"{name}.npz")
    hidden = jax.jit(partial(hidden_states, config))(params, ids[None])[0, :-1]
    logprobs = jax.jit(lambda params, part: jax.nn.log_softmax(logits_of(config, params, part)))
    got = np.concatenate(
        [
            np.take_along_axis(np.asarray(logprobs(params, hidden[i : i + 256])), ids[i + 1 : i + 257, None], 1)[:, 0]
            for i in range(0, len(ids) - 1, 256)
        ]
    )
    print(f"{name}: largest difference of a log-probability {np.abs(got - expected['logprobs']).max():.1e}")
    assert len(got) == 2047
    np.testing.assert_allclose(got, expected["logprobs"], atol=LOGPROB_TOLERANCE)
    prompt, new = GREEDY
    # A second, shorter prompt in the batch: padding must not change the first answer.
    answers = generate(config, params, [ids[:prompt].tolist(), ids[:7].tolist()], new, stop_ids=())
    assert answers[0] == expected["greedy"].tolist()


@pytest.mark.parametrize("name", REAL)
def test_the_export_of_a_real_model_is_the_original(real_models, tmp_path, name):
    """bfloat16 weights read, widened, written in bfloat16 again: every byte of every tensor as it was."""
    config, params = load_hf(real_models[name])
    save_hf(tmp_path / "export", config, params, tokenizer=real_models[name], dtype="bfloat16")
    before = safetensors.read_header(real_models[name] / "model.safetensors")
    after = safetensors.read_header(tmp_path / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.code, tensor.shape) == (after[key].code, after[key].shape)
        first, second = (np.empty(tensor.shape, safetensors.DTYPES[tensor.code]) for _ in range(2))
        safetensors.read_into(tensor, key, first)
        safetensors.read_into(after[key], key, second)
        assert np.array_equal(first.view(np.uint16), second.view(np.uint16)), key
    tokens = np.array([_text_ids(real_models[name])[:24]])
    _run(
        [{"logits": str(tmp_path / "export"), "tokens": tokens.tolist(), "out": str(tmp_path / "logits.npz")}], tmp_path
    )
    ours = apply(config, params, tokens)[0]
    # Relative to the largest logit, about 25: torch's own float32 is 2e-4 away from its float64 here.
    theirs = np.load(tmp_path / "logits.npz")["0"]
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
