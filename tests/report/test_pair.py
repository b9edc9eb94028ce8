"""One pair as both models read it, and the faults that must not reach training."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from ctpd_jax.report.page import pair_page
from ctpd_jax.report.pair import pair_record, problems
from ctpd_jax.schema import Message, PreferencePair, TokenSide
from ctpd_jax.text.prepare import Limits, prepare_pairs
from ctpd_jax.text.prompts import load_text_model
from ctpd_jax.text.spans import align

RAW = PreferencePair("p", (Message("user", "Tell me about tea."),), "green leaves <script>", "no 🥐", "pairs.jsonl:1")
LIMITS = Limits(64, 64)


@pytest.fixture(scope="module")
def texts(toy_models):
    return dict(zip(("teacher", "student"), (load_text_model(str(folder)) for folder in toy_models)))


@pytest.fixture(scope="module")
def pair(texts):
    return prepare_pairs([RAW], texts["teacher"], texts["student"], LIMITS)[0][0]


def test_every_token_and_figure_of_a_pair_is_told(texts, pair):
    weights = tuple(np.arange(pair.response(side).num_spans, dtype=np.float32) for side in (0, 1))
    scores = {name: {"reference": -weights[side]} for side, name in enumerate(("chosen", "rejected"))}
    told = pair_record(pair, RAW, texts, weights, scores)
    for name in ("chosen", "rejected"):
        spans = told[name]["spans"]
        assert "".join(span["text"] for span in spans) == getattr(RAW, name)
        assert [span["weight"] for span in spans] == list(range(len(spans)))
        assert [span["logps"]["reference"] for span in spans] == [-i for i in range(len(spans))]
    assert [len(told["read"][model]) for model in texts] == [len(pair.teacher_prompt), len(pair.student_prompt)]
    page = pair_page(told, None).decode()
    assert "&lt;" in page and "<script" not in page and "reference -1.00" in page


def test_a_prepared_pair_has_no_fault(texts, pair):
    assert problems(pair, texts, LIMITS) == []
    cut = Limits(64, 4)
    assert problems(prepare_pairs([RAW], *texts.values(), cut)[0][0], texts, cut) == []


def with_student(pair, **changes):
    """The pair with another student's side of the chosen response."""
    aligned = pair.chosen
    return dataclasses.replace(
        pair, chosen=dataclasses.replace(aligned, student=dataclasses.replace(aligned.student, **changes))
    )


def test_a_fault_is_named(texts, pair):
    student = pair.chosen.student
    open_ended = with_student(pair, ids=np.append(student.ids[:-1], student.ids[0]))
    assert problems(open_ended, texts, LIMITS) == [
        "the chosen response does not end on its end of turn, in the student's tokens"
    ]
    last = pair.chosen.num_spans - 1
    merged = with_student(pair, span_ids=np.minimum(student.span_ids, last - 1))
    assert problems(merged, texts, LIMITS) == [f"span {last} of the chosen response has no student token"]
    loose = with_student(pair, span_ids=np.append(student.span_ids[:-1], -1).astype(np.int32))
    assert f"span {last} of the chosen response has no student token" in problems(loose, texts, LIMITS)
    assert "a student token of the chosen response lies in no span" in problems(loose, texts, LIMITS)
    assert len(problems(pair, texts, dataclasses.replace(LIMITS, end_of_turn=False))) == 4  # all end their turn


def test_a_doubled_bos_is_a_fault(texts, pair):
    bos = int(pair.teacher_prompt[0])
    tokenizer = SimpleNamespace(hf=SimpleNamespace(bos_token_id=bos))
    known = texts | {"teacher": SimpleNamespace(tokenizer=tokenizer, end_of_turn=texts["teacher"].end_of_turn)}
    assert problems(pair, known, LIMITS) == []
    twice = dataclasses.replace(pair, teacher_prompt=np.append(pair.teacher_prompt[:1], pair.teacher_prompt))
    assert problems(twice, known, LIMITS) == ["the teacher's prompt begins with two BOS tokens"]


def test_tokens_of_a_side_are_kept_in_order(texts, pair):
    told = pair_record(pair, RAW, texts)
    side: TokenSide = pair.chosen.student
    assert sum(len(span["student"]) for span in told["chosen"]["spans"]) == len(side.ids)
    assert told["chosen"]["spans"][0]["weight"] is None and told["chosen"]["spans"][0]["logps"] == {}


def test_a_notebook_shows_the_spans_of_a_response_as_text(toy_models):
    aligned = align("a <b> 🥐", *map(str, toy_models))
    page = aligned._repr_html_()
    assert page.count("<div style") == aligned.num_spans and "<b>" not in page and "&lt;" in page
    assert dataclasses.replace(aligned, html=None)._repr_html_() is None
    assert "html" not in repr(aligned)
