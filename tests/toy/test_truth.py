"""What is known of the toy world alone: known ratios and answers in, known figures out."""

import json
import sys

import numpy as np
import pytest
from toy.truth import auc, decisive_pieces, main, mean_and_error, piece_ratios, ranking, sampled_rewards, tables
from toy.world import piece_spans


def test_auc():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.array([0.0]), np.array([1.0])) == 0.0
    assert auc(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0.5
    assert auc(np.array([1.0]), np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx(1.5 / 4)


def test_spans_are_summed_into_the_piece_where_they_begin():
    text, prompt = "thank you, green leaves 🙂", "Tell me about tea."
    pieces = piece_spans(text, prompt)
    assert [piece.reward for piece in pieces] == [2.0, 0.25, 0.0]
    bounds = np.array([0, 5, 9, 10, 16, 23, len(text.encode()), len(text.encode())])  # the last one: end of turn
    ratios = np.array([1.0, 2.0, 0.5, 0.25, 0.125, 7.0, 100.0])
    found = piece_ratios(text, prompt, bounds, ratios)
    assert [reward for reward, _ in found] == [2.0, 0.25, 0.0]
    assert sum(ratio for _, ratio in found) == pytest.approx(ratios[:-1].sum())
    assert found[0][1] == pytest.approx(ratios[(bounds[:-1] < pieces[0].end) & (np.diff(bounds) > 0)].sum())


def test_the_true_reward_of_sampled_answers(tmp_path):
    folder = tmp_path / "evaluation" / "samples"
    folder.mkdir(parents=True)
    for name, answers in {"ctpd": ["thank you", "thank you, green leaves"], "teacher": ["who cares"]}.items():
        samples = [{"prompt": "Tell me about tea.", "answer": answer} for answer in answers]
        (folder / f"{name}.json").write_text(json.dumps({"inputs": {}, "samples": samples}))
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": {"teacher": {}, "ctpd": {}, "gone": {}}}))
    found = sampled_rewards(tmp_path)
    assert list(found) == ["teacher", "ctpd"]
    assert found["ctpd"] == pytest.approx({"mean": 2.125, "error": 0.125, "count": 2})
    assert found["teacher"]["mean"] == -2 and np.isnan(mean_and_error([1.0])["error"])
    assert decisive_pieces(tmp_path) is None
    said = tables(tmp_path)
    assert "  ctpd          +2.12 ± 0.12   n = 2" in said and "  teacher       -2.00   n = 1" in said


def test_the_true_reward_of_proposed_pairs(tmp_path):
    assert ranking(tmp_path) is None
    (tmp_path / "proposals").mkdir()
    prompt = [{"role": "user", "content": "Tell me about tea."}]
    answers = [("thank you", "who cares"), ("who cares", "thank you"), ("thank you", "green leaves")]
    rows = [{"prompt": prompt, "chosen": better, "rejected": worse} for better, worse in answers]
    (tmp_path / "proposals" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = ranking(tmp_path)
    assert found["true reward, chosen"] == pytest.approx((2 - 2 + 2) / 3)
    assert found["true reward, rejected"] == pytest.approx((-2 + 2 + 0.25) / 3)
    assert found["the better one is chosen"] == pytest.approx(2 / 3) and found["proposed pairs"] == 3


def test_a_run_that_was_not_evaluated_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["truth.py", str(tmp_path)])
    assert main() == 2
    assert "run `ctpd evaluate` first" in capsys.readouterr().err
