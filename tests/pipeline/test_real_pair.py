"""The two real models: a bfloat16 teacher against the exact one, a student with adapters, opened by PEFT.

Slow: builds the real models the first time, and torch runs in an environment of its own.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import HELPERS, ROOT, real_assets
from toy.world import generate_pairs

from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import main
from ctpd_jax.models.decoder import apply
from ctpd_jax.models.hf import load_hf
from ctpd_jax.schema import SIDES
from ctpd_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow
CONFIG = str(ROOT / "configs" / "pair.py")
TOKENS = list(range(300, 340))


@pytest.fixture(scope="module")
def overrides(real_models, tmp_path_factory):
    """A pair of prompts steers the teacher, so that nothing but the student has to be trained."""
    data = tmp_path_factory.mktemp("data")
    for name, number in (("train", 16), ("test", 4)):
        rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in generate_pairs(name, number)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"--config.teacher.path={real_models['gemma3-270m']}",
        f"--config.student.path={real_models['smollm2-135m-instruct']}",
        f"--config.data.train={data / 'train.jsonl'}",
        f"--config.data.test={data / 'test.jsonl'}",
        "--config.weights.source=prompts",
        "--config.teacher_sft.steps=-1",
        "--config.student_sft.steps=-1",
        "--config.train.steps=4",
        "--config.train.batch_size=4",
        "--config.train.lr=5e-4",
        "--config.train.lora.rank=8",
        "--config.evaluate.samples=0",
    ]


@pytest.fixture(scope="module")
def trained(overrides, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapters")
    arguments = ["--config", CONFIG, "--workdir", str(workdir), *overrides, "--config.export.adapters=True"]
    assert main(["run", *arguments]) == 0
    return workdir


def test_ctpd_trains_adapters_on_the_real_student(trained):
    lines = read_metrics(trained, "train")
    assert len(lines) == 4 and all(np.isfinite(line["loss"]) for line in lines)
    assert lines[0]["rewards/margin_from_start"] == pytest.approx(0, abs=1e-3)
    assert lines[-1]["rewards/margin_from_start"] > 0.01
    assert (trained / "train" / "params").exists()
    size = sum(file.stat().st_size for file in (trained / "train" / "params").rglob("*") if file.is_file())
    assert size < 2e7  # of 538 MB for all parameters


def test_peft_opens_the_adapters_and_finds_the_merged_model(trained, real_models, tmp_path):
    out = tmp_path / "logits.npz"
    job = {
        "base": str(real_models["smollm2-135m-instruct"]),
        "adapters": str(trained / "adapters"),
        "merged": str(trained / "export"),
        "tokens": TOKENS,
        "out": str(out),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    real_assets.run_in_assets_venv(HELPERS / "peft_reference.py", tmp_path / "job.json")
    found = np.load(out)
    ours = apply(*load_hf(trained / "export"), np.array([TOKENS]))[0]
    print(f"adapters against merged, in torch: {np.abs(found['adapters'] - found['merged']).max():.1e}")
    np.testing.assert_allclose(found["adapters"], found["merged"], atol=1e-4)
    np.testing.assert_allclose(ours, found["merged"], atol=1e-4)
    assert np.abs(found["adapters"] - found["base"]).max() > 0.01


def test_a_bfloat16_teacher_gives_the_very_numbers(trained, overrides, tmp_path):
    """Its checkpoint is bfloat16."""
    arguments = ["annotate", "--config", CONFIG, "--workdir", str(tmp_path), *overrides]
    assert main([*arguments, "--config.annotate.teacher_weights=bfloat16"]) == 0
    exact, half = (open_store(folder / "annotations", verify=False) for folder in (trained, tmp_path))
    for i in range(len(exact)):
        for side in SIDES:
            for name, values in exact[i][1][side].items():
                np.testing.assert_array_equal(half[i][1][side][name], values, err_msg=name)
