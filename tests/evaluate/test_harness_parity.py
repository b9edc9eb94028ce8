"""lm-eval asks `DecoderLM` and its own `hf` model the same questions: real models, tasks without network."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from helpers import HELPERS, ROOT, real_assets
from helpers.harness_tasks import NAMES, write_tasks

pytestmark = pytest.mark.parity
LOGPROB = 1e-3
# Of the models as they are; by the chat template; and as if they were short: contexts lose their beginning, and texts
# are read in several windows.
CASES = (
    ("gemma3-270m", {"chat": False, "max_length": None, "batch_size": 1}),
    ("smollm2-135m-instruct", {"chat": False, "max_length": None, "batch_size": 4}),
    ("smollm2-135m-instruct", {"chat": True, "max_length": None, "batch_size": 1}),
    ("gemma3-270m", {"chat": False, "max_length": 40, "batch_size": 1}),
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize(("name", "asked"), CASES, ids=str)
def test_every_answer_is_that_of_lm_evals_own_model(real_models, tasks, tmp_path, monkeypatch, name, asked):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra of its own: eval")
    from lm_eval.tasks import TaskManager

    from ctpd_jax.evaluate.harness import DecoderLM

    # 1. Theirs.
    out, folder = tmp_path / "theirs.json", real_models[name]
    script = HELPERS / "lm_eval_reference.py"
    real_assets.run_in_assets_venv(script, str(folder), tasks, str(out), json.dumps(asked))
    theirs = json.loads(out.read_text())["answers"]

    # 2. Ours.
    if asked["max_length"]:
        monkeypatch.setattr(DecoderLM, "max_length", asked["max_length"])
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = lm_eval.simple_evaluate(
        DecoderLM(folder, batch_tokens=1024, dtype="float32"),
        tasks=list(NAMES),
        task_manager=manager,
        apply_chat_template=asked["chat"],
        torch_random_seed=None,
    )
    ours = {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}

    # 3. Log-probabilities, greedy or not, and answers.
    assert ours.keys() == theirs.keys() == set(NAMES)
    worst = 0.0
    for task in ("own_endings", "own_letters"):
        mine, other = (np.array(answers[task], float)[..., 0, :] for answers in (ours, theirs))
        assert mine.shape == other.shape == (8, 4, 2)
        worst = max(worst, np.abs(mine[..., 0] - other[..., 0]).max())
        assert (mine[..., 1] == other[..., 1]).all()
    worst = max(worst, np.abs(np.array(ours["own_text"], float) - np.array(theirs["own_text"], float)).max())
    print(f"\n{name} {asked}: largest difference {worst:.1e}; {ours['own_answers'][0][0]}")
    assert worst < LOGPROB
    assert ours["own_answers"] == theirs["own_answers"]


def test_what_runs_lm_eval_here_is_the_version_of_the_extras():
    named = re.findall(r'"(lm-eval[^"]*)"', (ROOT / "setup.py").read_text())
    assert named and set(named) <= set(real_assets.LIBRARIES)
