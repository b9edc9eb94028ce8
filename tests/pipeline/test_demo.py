"""The demo as the README tells it: it ends well, its figures make sense, and transformers opens what it exports."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import HELPERS, ROOT, real_assets
from toy.truth import decisive_pieces, sampled_rewards

from ctpd_jax.cli import main
from ctpd_jax.models.decoder import apply
from ctpd_jax.models.hf import load_hf


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("demo")
    assert main(["run", "--config", str(ROOT / "configs/demo.py"), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(demo):
    found = json.loads((demo / "evaluation.json").read_text())
    pieces, models = decisive_pieces(demo), found["models"]
    assert pieces["AUC, good against neutral"] > 0.7 and pieces["AUC, neutral against bad"] > 0.7
    assert pieces["log-ratio, good pieces"] > pieces["log-ratio, neutral pieces"] > pieces["log-ratio, bad pieces"]
    assert models["ctpd"]["margin_vs_start"] > 0
    assert models["ctpd"]["all"]["vs_start"]["low"] > 0.5  # better than chance, with its interval
    rewards = sampled_rewards(demo)
    assert set(rewards) == set(models)
    for row in ("ctpd", "ctpd_proposed"):  # with labels, and with the student's own answers alone
        gain = rewards[row]["mean"] - rewards["student_start"]["mean"]
        assert gain > 2 * np.hypot(rewards[row]["error"], rewards["student_start"]["error"])


@pytest.mark.slow
def test_transformers_opens_the_export_and_finds_our_logits(demo, tmp_path):
    config, params = load_hf(demo / "export")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 64))
    jobs, out = tmp_path / "jobs.json", tmp_path / "logits.npz"
    jobs.write_text(json.dumps([{"logits": str(demo / "export"), "tokens": tokens.tolist(), "out": str(out)}]))
    real_assets.run_in_assets_venv(HELPERS / "torch_reference.py", jobs)
    theirs = np.load(out)
    ours = np.asarray(apply(config, params, tokens))
    for row in range(len(tokens)):
        assert np.abs(ours[row] - theirs[str(row)]).max() < 1e-4
