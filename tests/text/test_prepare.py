"""Pairs made ready for both models, and what is counted on the way."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.small_tokenizers import core, fast, small
from tokenizers import Tokenizer

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message, PreferencePair
from ctpd_jax.text import prepare, spans
from ctpd_jax.text.prepare import Limits, prepare_pairs, steered_prompt
from ctpd_jax.text.prompts import TextModel
from ctpd_jax.text.templates import PromptTemplate
from ctpd_jax.text.tokens import encode, load_tokenizer

TEACHER = TextModel(small("bpe-prepend"), PromptTemplate("plain", "\n\n"), end_of_turn=2)
STUDENT = TextModel(small("byte"), PromptTemplate("plain", " "), end_of_turn=0)
WIDE = Limits(prompt=500, response=500)


def pair(prompt="Why?", chosen="the fox", rejected="the dog", id="a"):
    return PreferencePair(id, (Message("user", prompt),), chosen, rejected, source=f"{id}.jsonl:1")


def test_a_pair_that_fits_is_whole_and_closed():
    (ready,), counters = prepare_pairs([pair()], TEACHER, STUDENT, WIDE)
    assert ready.student_prompt.tolist() == STUDENT.prompt([Message("user", "Why?")]).tolist()
    assert ready.chosen.teacher.ids.tolist() == [*encode(TEACHER.tokenizer, "the fox"), 2]
    assert ready.rejected.student.ids.tolist() == [*encode(STUDENT.tokenizer, "the dog"), 0]
    assert (ready.truncated, ready.dropped, ready.chosen_bytes) == ((False, False), 0, 7)
    assert counters["pairs"] == 1 and counters["responses"] == 2
    assert counters["bytes"] == counters["bytes kept"] == 14
    assert counters["spans"] == ready.chosen.num_spans + ready.rejected.num_spans


def test_only_whole_pairs_are_counted():
    """The chosen answer fits and the rejected one has no boundary within the limit: nothing of the pair counts."""
    emoji = pair(rejected="\U0001f680 yes", id="b")
    limits = Limits(prompt=500, response=3)
    ready, counters = prepare_pairs([pair(chosen="a"), emoji], TEACHER, STUDENT, limits)
    assert [one.id for one in ready] == ["a"]
    assert counters["left out: no common boundary within the response limit"] == 1
    alone = prepare_pairs([pair(chosen="a")], TEACHER, STUDENT, limits)[1]
    for name in ("responses", "responses cut", "spans", "teacher tokens", "student tokens", "bytes", "bytes kept"):
        assert counters[name] == alone[name], name
    assert counters["responses"] == 2


def test_a_response_that_was_cut_has_no_end_of_turn():
    (ready,), counters = prepare_pairs([pair(chosen="the fox " * 9)], TEACHER, STUDENT, Limits(500, response=6))
    assert ready.truncated == (True, False) and counters["responses cut"] == 1
    assert ready.chosen.teacher.ids[-1] != 2 and ready.rejected.teacher.ids[-1] != 2  # on neither side
    assert ready.chosen.student.ids[-1] != 0 and ready.rejected.student.ids[-1] != 0
    assert counters["pairs without end of turn, one side cut"] == 1
    lopsided = Limits(500, response=6, end_of_turn_both=False)
    (ready,), counters = prepare_pairs([pair(chosen="the fox " * 9)], TEACHER, STUDENT, lopsided)
    assert ready.chosen.teacher.ids[-1] != 2 and ready.rejected.teacher.ids[-1] == 2
    assert counters["pairs with end of turn on one side, one side cut"] == 1
    assert counters["bytes kept"] == ready.chosen.bounds[-1] + ready.rejected.bounds[-1] < counters["bytes"]
    bare, _ = prepare_pairs([pair()], TEACHER, STUDENT, Limits(500, 500, end_of_turn=False))
    assert bare[0].chosen.teacher.ids.tolist() == encode(TEACHER.tokenizer, "the fox").tolist()


def test_special_tokens_that_people_typed_are_counted_for_each_model():
    typed = pair("What is </s>?", "<|im_end|> and </s><s>", "the dog")
    (ready,), counters = prepare_pairs([typed], TEACHER, STUDENT, WIDE)
    assert counters["teacher literal special tokens escaped"] == 3  # </s>, </s>, <s>
    assert counters["student literal special tokens escaped"] == 1  # <|im_end|>
    assert not np.isin(ready.chosen.teacher.ids[:-1], [1, 2]).any()
    none = prepare_pairs([pair()], TEACHER, STUDENT, WIDE)[1].counts
    assert none["teacher literal special tokens escaped"] == none["student literal special tokens escaped"] == 0


def test_merges_with_the_prompt_as_it_was_cut_are_counted():
    name = "student tokens that would merge across the prompt's border"
    # The student's prompts end in a space, and " fox" is one of its tokens.
    assert prepare_pairs([pair(chosen="fox", rejected="\n")], TEACHER, STUDENT, WIDE)[1][name] == 1
    long = pair("the dog " * 50, chosen="fox", rejected="\n")
    (ready,), counters = prepare_pairs([long], TEACHER, STUDENT, Limits(20, 500))
    assert counters[name] == 1 and counters["prompts cut"] == 1
    assert counters["prompt characters cut"] == ready.dropped > 0
    assert len(ready.teacher_prompt) <= 20 and len(ready.student_prompt) <= 20


def test_pairs_that_cannot_be_used_are_left_out_and_counted():
    state = json.loads(core("byte").to_str())
    del state["model"]["vocab"]["\u0104"]  # the byte 0x04
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(state["model"]["vocab"])}
    lacking = TextModel(load_tokenizer(fast(Tokenizer.from_str(json.dumps(state)))), STUDENT.template, 0)
    system = PreferencePair("s", (Message("system", "the fox " * 50),), "A", "B")
    ready, counters = prepare_pairs([pair(), pair(chosen="\x04"), system], TEACHER, lacking, Limits(20, 500))
    assert [one.id for one in ready] == ["a"]
    assert counters["left out: characters that a vocabulary lacks"] == 1
    assert counters["left out: template longer than the prompt limit"] == 1
    with pytest.raises(UserError, match=r"None of 1 pairs is left.*max_prompt_tokens"):
        prepare_pairs([system], TEACHER, STUDENT, Limits(20, 500))


def refusing(model):
    """The model with a template that refuses two user turns in a row."""
    source = (
        "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}\n{% endfor %}"
    )
    return replace(model, template=PromptTemplate("chat", source))


def test_what_a_template_refuses_is_a_row_that_is_left_out():
    twice = PreferencePair("t", (Message("user", "Hi"), Message("user", "the fox")), "the fox", "the dog", "b.jsonl:7")
    empty = PreferencePair("e", (), "the fox", "the dog", "b.jsonl:9")
    ready, counters = prepare_pairs([pair(), twice, empty], TEACHER, refusing(STUDENT), WIDE)
    assert [one.id for one in ready] == ["a"]
    assert counters["left out: no prompt can be made of the messages"] == 1
    assert counters["left out: an empty prompt predicts nothing"] == 1
    assert "b.jsonl:7: The chat template refuses" in counters.reasons() and "must alternate" in counters.reasons()
    assert "b.jsonl:9: the prompt is empty" in counters.reasons()


def test_tokens_that_do_not_spell_the_text_cost_one_pair(monkeypatch):
    def align_batch(texts, teacher, student, unit):
        if any("cat" in text for text in texts):
            raise UserError("the tokens do not spell the text 'x.cat'")
        return spans.align_batch(texts, teacher, student, unit)

    monkeypatch.setattr(prepare, "align_batch", align_batch)
    pairs = [pair(), pair(chosen="x.cat", id="b"), pair(chosen="the", id="c")]
    ready, counters = prepare_pairs(pairs, TEACHER, STUDENT, WIDE)
    assert [one.id for one in ready] == ["a", "c"]
    assert counters.notes["left out: tokens that do not spell the text"] == [
        "b.jsonl:1: the tokens do not spell the text 'x.cat'"
    ]


def test_answers_that_differ_behind_the_limit_alone_are_left_out():
    same = pair("Why?", "the fox " * 9 + "yes", "the fox " * 9 + "no", id="b")
    ready, counters = prepare_pairs([pair(), same], TEACHER, STUDENT, Limits(500, response=9))
    assert [one.id for one in ready] == ["a"]
    assert counters.notes["left out: answers identical within the response limit"] == ["b.jsonl:1"]
    # One is whole and one is cut: alike where neither ends its turn.
    ready, counters = prepare_pairs([pair(chosen="a"), pair(chosen="the")], TEACHER, STUDENT, Limits(500, response=3))
    assert len(ready) == 1 and counters["left out: answers identical within the response limit"] == 1


def test_an_instruction_leads_what_is_left_of_the_last_question():
    talk = PreferencePair("t", (Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "abcdef")), "A", "B")
    assert [m.content for m in steered_prompt(talk, 2, "Lie.")] == ["Hi", "Ho", "Lie.\n\ncdef"]
    assert steered_prompt(PreferencePair("e", (), "A", "B"), 0, "Lie.") == [Message("user", "Lie.\n\n")]


def test_a_thought_that_the_prompt_opens_is_counted_where_the_answer_does_not_go_on_in_it():
    asks = TextModel(STUDENT.tokenizer, PromptTemplate("plain", " <think>\n"), end_of_turn=0)
    pairs = [
        pair(chosen="hm</think>yes", rejected="so</think>no", id="a"),
        pair(chosen="<think>hm</think>yes", rejected="no", id="b"),
    ]
    _, counters = prepare_pairs(pairs, TEACHER, asks, WIDE)
    found = {name: count for name, count in counters.counts.items() if "<think>" in name}
    assert sorted(found.values()) == [1, 1] and all(name.startswith("student") for name in found)
    assert {"opened again" in name for name in found} == {True, False}
