"""`DecoderLM` and `ctpd evaluate --harness` on the toy models, against every question run alone."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import partial, partialmethod
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import MICRO
from helpers.harness_tasks import write_tasks

from ctpd_jax.cli import main
from ctpd_jax.errors import UserError
from ctpd_jax.models.decoder import apply
from ctpd_jax.models.sampling import generate

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is the extra `eval`")
TEA = "Tell me about tea."


def _asked(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def model(toy_models):
    from ctpd_jax.evaluate.harness import DecoderLM

    return DecoderLM(toy_models[1], batch_tokens=256, dtype="float32")


def _alone(model, context, continuation):
    ids = np.zeros((1, 64), np.int32)
    ids[0, : len(context) + len(continuation)] = [*context, *continuation]
    logits = jax.jit(apply, static_argnums=0)(model.decoder, model.params, ids)[0, len(context) - 1 :]
    logps = np.asarray(jax.nn.log_softmax(logits))[: len(continuation)]
    return logps[np.arange(len(logps)), continuation].sum(), logps.argmax(-1).tolist() == list(continuation)


@needs_lm_eval
def test_log_probabilities_are_those_of_every_question_alone(model):
    """A space at the end of the context belongs to the continuation; without a context there is one token."""
    encode = partial(model.tokenizer.encode, add_special_tokens=False)
    bos = [model.prefix_token_id]
    likeliest = model.tokenizer.decode(generate(model.decoder, model.params, [model.tok_encode(TEA)], 1)[0])
    questions = [(TEA, " green leaves"), (f"{TEA} ", "dark"), ("", "green"), (TEA, likeliest), (TEA, " x")] * 3
    found = model.loglikelihood([_asked(*question) for question in questions])
    for (context, continuation), (total, greedy) in zip(questions[:5], found):
        whole, start = model.tok_encode(context + continuation), model.tok_encode(context.rstrip())
        ids = (start, whole[len(start) :]) if context else (bos, encode(continuation))
        expected = _alone(model, *ids)
        assert total == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    assert found[3][1]
    for first, *others in zip(found[:5], found[5:10], found[10:]):
        assert [total for total, _ in others] == pytest.approx([first[0]] * 2, abs=1e-4)


@needs_lm_eval
def test_long_texts_are_read_in_windows(model, monkeypatch):
    monkeypatch.setattr(type(model), "max_length", 8)
    text = "green leaves and dark milk, and one cup more"
    ids = model.tok_encode(text)
    assert len(ids) > 16
    total = _alone(model, [model.prefix_token_id], ids[:8])[0]
    for first in range(8, len(ids), 8):  # the last window is as long as the others
        last = min(first + 8, len(ids))
        total += _alone(model, ids[last - 9 : first], ids[first:last])[0]
    found = model.loglikelihood_rolling([_asked(text), _asked("tea"), _asked(text)])
    assert [found[0], found[2]] == pytest.approx([total, total], abs=1e-3) and found[1] > found[0]


@needs_lm_eval
def test_answers_end_at_stop_texts_and_are_those_of_generate(model):
    prompts = [TEA, "And coffee, in one line?", f"{TEA} {TEA}"]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    found = model.generate_until([_asked(prompt, settings) for prompt in prompts])
    ids = [model.tok_encode(prompt) for prompt in prompts]
    expected = generate(model.decoder, model.params, ids, 12, stop_ids=(model.eot_token_id, *model.decoder.eos_ids))
    assert found == [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in expected]
    # Other settings in one call: a stop text, and draws, which differ though the question is the same.
    stop = found[0][len(found[0]) // 2 :][:2]
    drawn = settings | {"do_sample": True, "temperature": 2.0, "top_k": 50}
    asked = [(TEA, drawn), (TEA, settings | {"until": [stop]}), (TEA, drawn)]
    first, cut, second = model.generate_until([_asked(*each) for each in asked])
    assert cut == found[0].partition(stop)[0] and first != second
    with pytest.raises(UserError, match="answers with penalty_alpha;"):
        model.generate_until([_asked(TEA, settings | {"penalty_alpha": 0.5})])
    with pytest.raises(UserError, match="answers of 9999 tokens"):
        model.generate_until([_asked(TEA, {"max_gen_toks": 9999})])


@needs_lm_eval
def test_the_chat_template_is_the_folders_and_writes_bos_once(model):
    text = model.apply_chat_template([{"role": "user", "content": TEA}])
    assert text == model.tokenizer.apply_chat_template(
        [{"role": "user", "content": TEA}], tokenize=False, add_generation_prompt=True
    )
    assert model.chat_template(True) == model.tokenizer.chat_template
    bos = model.tokenizer.decode(model.prefix_token_id)
    assert model.tok_encode(bos + TEA) == model.tokenizer.encode(bos + TEA, add_special_tokens=False)


# ------------------------------------------------------------------------------------------------ the command


@needs_lm_eval
def test_a_row_of_a_run_and_a_folder_are_asked_and_written_as_lm_eval_writes(tmp_path, toy_models, capsys):
    """The student's start in a run that leaves its SFT out is the checkpoint that was brought: the folder."""
    out, tasks = tmp_path / "out", write_tasks(tmp_path / "tasks")
    asked = ["evaluate", "--harness", "own_endings:1", "--harness-tasks", tasks, "--limit", "3", "--workdir", str(out)]
    row = ["--config", MICRO, "--config.student_sft.steps=-1", "--model", "student_start", "--log-samples"]
    assert main([*asked, *row]) == 0
    shown = capsys.readouterr().out
    (file,) = (out / "harness" / "student_start").glob("results_*.json")
    written = json.loads(file.read_text())
    figure = written["results"]["own_endings"]["acc_norm,none"]
    assert "own_endings acc_norm" in shown and re.search(
        rf"student_start +{100 * figure:.2f} +{100 * figure:.2f}\n", shown
    )
    assert written["n-shot"] == {"own_endings": 1} and written["model_name"] == "student_start"
    assert written["config"]["model_num_parameters"] > 0
    (samples,) = file.parent.glob("samples_own_endings_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3
    assert main([*asked, "--folder", str(toy_models[1])]) == 0
    (other,) = set(out.rglob("results_*.json")) - {file}
    assert json.loads(other.read_text())["results"] == written["results"]
    assert len(list(out.rglob("samples_*"))) == 1


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--harness", "own_nothing"], "knows no task own_nothing"),
        (["--harness", "own_text:many"], "NAME or NAME:SHOTS"),
        (["--harness", "own_letters", "--model", "best"], "no model 'best'"),
        (["--harness", "own_letters", "--model", "ctpd"], "is not finished"),
        (["--harness", "own_text"], "The task own_text cannot be loaded"),
    ],
)
def test_what_is_not_there_is_named_before_a_model_is_read(tmp_path, capsys, monkeypatch, arguments, message):
    tasks = write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks" / "own_text.jsonl").unlink()
    from lm_eval.tasks import TaskManager  # it would look through all of lm-eval's, which takes seconds

    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    line = ["evaluate", "--config", MICRO, "--workdir", str(tmp_path / "run"), "--harness-tasks", tasks, *arguments]
    assert main(line) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--harness", "--config", MICRO], "pip install 'ctpd-jax[eval]'"),
        (["--harness"], "give --config of a run, or --harness and --folder"),
        (["--harness", "--folder", "x", "--config", MICRO], "give --config of a run, or --harness and --folder"),
        ([], "give --config of a run"),
        (["--config", MICRO, "--limit", "3"], "lm-eval is told belong to --harness"),
        (["--folder", "x"], "belong to --harness"),
    ],
)
def test_what_is_missing_or_too_much_is_named(tmp_path, capsys, monkeypatch, arguments, message):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else there(name, *rest)
    )
    assert main(["evaluate", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err
