"""No field that changes the text can vanish: every leaf of every layout is used, counted, or documented as harmless."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Counters, Message
from ctpd_jax.text import columns
from ctpd_jax.text.columns import LeftOut, Reading, harmless
from ctpd_jax.text.preferences import load_preferences
from ctpd_jax.text.read_row import read_row

SEPARATOR = "\n\nAssistant:"
ALL = Reading({}, ranked="all")


def said(*turns):
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[role], "content": text} for role, text in turns]


def read(row, reading=ALL):
    counters = Counters()
    return read_row(row, SEPARATOR, counters, reading), counters


def reason(row, reading=ALL):
    """Why a row is left out."""
    [found] = read(row, reading)[0]
    assert isinstance(found, LeftOut), found
    return found.reason


QUESTION = (Message("user", "Q"),)
# Every one says: asked Q, A is better than B.
WILD = {
    "texts": {"prompt": "Q", "chosen": "A", "rejected": "B", "tools": [], "images": None, "metadata": {"a": "b"}},
    "messages and a rejected response": {"messages": said(("u", "Q"), ("a", "A")), "rejected_response": "B"},
    "messages and rejected messages": {
        "messages": said(("u", "Q"), ("a", "A")),
        "rejected_messages": said(("u", "Q"), ("a", "B")),
    },
    "conversation and one message each": {
        "conversation": said(("u", "Q")),
        "chosen": said(("a", "A")),
        "rejected": said(("a", "B")),
        "conversation_id": "c1",
    },
    "OpenAI": {
        "input": {"messages": said(("u", "Q")), "tools": [], "parallel_tool_calls": True},
        "preferred_output": said(("a", "A")),
        "non_preferred_output": said(("a", "B")),
    },
    "output, the better one first": {"instruction": "Q", "input": "", "output": ["A", "B"], "history": []},
    "UltraFeedback": {
        "source": "s",
        "instruction": "Q",
        "models": ["m", "n"],
        "completions": [
            {"response": "B", "overall_score": 3.0, "critique": "bad", "model": "m", "custom_system_prompt": "be"},
            {"response": "A", "overall_score": 8.5, "critique": "good", "model": "n", "annotations": {"x": {"y": "z"}}},
        ],
        "correct_answers": ["None"],
    },
    "answers with ranks": {"question": "Q", "answers": [{"answer": "B", "rank": 2}, {"answer": "A", "rank": 1}]},
    "HelpSteer 3": {
        "domain": "general",
        "language": "english",
        "context": said(("u", "Q")),
        "response1": "B",
        "response2": "A",
        "overall_preference": 2,
        "individual_preference": [{"score": 2, "reasoning": "because", "feedback_for_1": "no"}],
    },
    "HelpSteer 2": {"prompt": "Q", "response_1": "A", "response_2": "B", "preference_strength": -1},
    "two answers and a label": {"prompt": "Q", "response_a": "A", "response_b": "B", "label": "a", "model_a": "m"},
    "two answers and a winner": {"prompt": "Q", "response_a": "B", "response_b": "A", "winner": "model_b"},
    "LMSYS": {
        "id": 1,
        "model_a": "m",
        "model_b": "n",
        "prompt": '["Q"]',
        "response_a": '["A"]',
        "response_b": '["B"]',
        "winner_model_a": 1,
        "winner_model_b": 0,
        "winner_tie": 0,
    },
    "arena": {
        "question_id": "x",
        "conversation_a": said(("u", "Q"), ("a", "B")),
        "conversation_b": said(("u", "Q"), ("a", "A")),
        "winner": "model_b",
        "judge": "one",
        "turn": 1,
    },
    "SHP": {
        "post_id": "p",
        "history": "Q",
        "human_ref_A": "A",
        "human_ref_B": "B",
        "labels": 1,
        "score_A": 5,
        "c_root_id_A": "r",
        "seconds_difference": 7.0,
    },
    "PKU-SafeRLHF": {"prompt": "Q", "response_0": "B", "response_1": "A", "better_response_id": 1},
    "messages as JSON text": {
        "prompt": json.dumps(said(("u", "Q"))),
        "chosen": json.dumps(said(("a", "A"))),
        "rejected": str(said(("a", "B"))),  # Python's own notation
    },
    "HH-RLHF": {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
}
LONGER = {
    "system, history, prompt": {
        "system": "S",
        "history": [["q", "a"]],
        "instruction": "I",
        "input": "Q",
        "chosen": "A",
        "rejected": "B",
    },
    "system beside conversations": {
        "system": "S",
        "chosen": [*said(("u", "q"), ("a", "a"), ("u", "I\nQ")), {"from": "gpt", "value": "A"}],
        "rejected": [*said(("u", "q"), ("a", "a"), ("u", "I\nQ")), {"from": "gpt", "value": "B"}],
    },
    "history beside conversations": {
        "system": "S",
        "history": [["q", "a"]],
        "prompt": "I\nQ",
        "chosen": said(("u", "I\nQ"), ("a", "A")),
        "rejected": said(("u", "I\nQ"), ("a", "B")),
    },
    "history as messages": {
        "history": said(("u", "q"), ("a", "a")),
        "system_prompt": "S",
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "I\nQ"}], "weight": 1, "name": None}],
        "chosen": "A",
        "rejected": "B",
    },
}


@pytest.mark.parametrize("name", WILD)
def test_layouts_met_in_the_wild_give_the_same_pair(name):
    [pair], _ = read(WILD[name])
    assert not isinstance(pair, LeftOut), pair.args
    assert (pair.prompt, pair.chosen, pair.rejected) == (QUESTION, "A", "B")


@pytest.mark.parametrize("name", LONGER)
def test_system_and_history_come_before_the_prompt(name):
    [pair], _ = read(LONGER[name])
    assert not isinstance(pair, LeftOut), pair.args
    assert [(m.role[0], m.content) for m in pair.prompt] == [("s", "S"), ("u", "q"), ("a", "a"), ("u", "I\nQ")]
    assert (pair.chosen, pair.rejected) == ("A", "B")


# ------------------------------------------------------------------------------------------------ the property


def changed(value, at=()):
    """Every way to change one thing in a value: (path, what was done, the changed value)."""
    if isinstance(value, dict):
        for name in value:
            yield (*at, name), "renamed", {(f"{key}x" if key == name else key): v for key, v in value.items()}
            for path, what, new in changed(value[name], (*at, name)):
                yield path, what, {**value, name: new}
        for name, new in (("unheard_of", "x"), ("tools", [{"name": "f"}]), ("weight", 0), ("reasoning_content", "x")):
            yield (*at, name), "added", {**value, name: new}
    elif isinstance(value, list):
        for place, item in enumerate(value):
            for path, what, new in changed(item, at):
                yield path, what, [*value[:place], new, *value[place + 1 :]]
    elif isinstance(value, bool) or value is None:
        yield at, "changed", "changed"
    elif isinstance(value, int | float):
        yield at, "changed", -value - 1
    else:
        yield at, "changed", value + " changed"
        yield at, "changed", {"changed": f"{value} changed"}


def outcome(row):
    found, counters = read(copy.deepcopy(row))
    return [(one.reason if isinstance(one, LeftOut) else one) for one in found], counters.counts


def at(row, path):
    for name in path:
        row = row[0] if isinstance(row, list) else row
        row = row.get(name) if isinstance(row, dict) else row
    return row


@pytest.mark.parametrize("name", [*WILD, *LONGER])
def test_no_field_that_changes_the_text_can_vanish(name):
    row = (WILD | LONGER)[name]
    before = outcome(row)
    ways = list(changed(row))
    assert len(ways) >= 10
    for path, what, new in ways:
        documented = any(harmless(part, "a text") for part in path)
        field = (*path[:-1], f"{path[-1]}x") if what == "renamed" else path
        number = harmless(field[-1], at(new, field))  # it still holds no text
        assert outcome(new) != before or documented or number, (path, what, new)


def test_a_column_that_repeats_what_is_read_is_fine_until_it_differs():
    row = GOOD | {"question": "Q"}
    assert read(row)[0][0].prompt == QUESTION
    assert 'column "question"' in reason(row | {"question": "R"})


def test_the_document_lists_what_is_harmless():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    words = set(re.findall(r"\w+", text))
    for listed in (columns.HARMLESS_ENDINGS, columns.HARMLESS_NAMES, columns.NEVER_HARMLESS, columns.LEARNED):
        assert listed <= words, listed - words


def test_no_listed_name_is_judged_twice():
    ends = [name.split("_")[-1] for name in columns.NEVER_HARMLESS]
    assert not (columns.NEVER_HARMLESS | columns.LEARNED) & columns.HARMLESS_NAMES
    assert all(not harmless(name, "text") for name in (*columns.NEVER_HARMLESS, *columns.LEARNED, "foo")), ends


# ------------------------------------------------------------------------------------------------ reasons

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
ANSWER = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        *(
            (GOOD | {name: "x"}, f'column "{name}" is not understood')
            for name in ("images", "documents", "foo", "query")
        ),
        (GOOD | {"tools": [{"name": "f"}]}, 'column "tools" is not understood'),
        (GOOD | {"chat_template_kwargs": {"enable_thinking": False}}, 'column "chat_template_kwargs"'),
        (GOOD | {"weight": 0}, 'column "weight" is not understood'),
        (GOOD | {"input": 12}, 'column "input" is not understood'),
        (GOOD | {"context": "C", "prompt": None, "question": "Q"}, 'column "question" is not understood'),
        (GOOD | {"prompt": [{"role": "tool", "content": "x"}]}, "unknown role"),
        (GOOD | {"prompt": [{"role": "user", "content": "x", "name": "Ann"}]}, 'message "name" is not understood'),
        (GOOD | {"chosen": [ANSWER | {"weight": 0}], "rejected": [ANSWER]}, 'message "weight" is not understood'),
        (
            GOOD | {"chosen": [ANSWER | {"reasoning_content": "r"}], "rejected": [ANSWER | {"reasoning_content": "s"}]},
            'message "reasoning_content" is not understood',
        ),
        (GOOD | {"prompt": said(("s", "S"), ("u", "Q")), "system": "other"}, "system message differ"),
        (GOOD | {"history": [["q"]]}, "history is no list"),
        (GOOD | {"history": "earlier"}, 'column "history" is not understood'),
        (GOOD | {"prompt": "[{'role': broken"}, "cannot be read"),
        ({"prompt": "Q", "response_a": "A", "response_b": "B", "label": 1}, "no verdict that names one"),
        ({"prompt": "Q", "response_a": "A", "response_b": "B", "winner": "tie (bothbad)"}, "a tie"),
        ({"prompt": "Q", "response1": "A", "response2": "B", "overall_preference": 0}, "a tie"),
        ({"instruction": "Q", "output": ["A", "B", "C"]}, "does not hold a better and a worse"),
        ({"instruction": "Q", "output": {"good": "A", "bad": "B"}}, "does not hold a better and a worse"),
    ],
)
def test_what_changes_the_meaning_is_a_reason(row, expected):
    assert expected in reason(row)


def test_fields_can_be_declared_harmless():
    reading = Reading({}, ignore=frozenset({"foo", "name"}))
    row = GOOD | {"foo": "x", "prompt": [{"role": "user", "content": "Q", "name": "Ann"}]}
    assert read(row, reading)[0][0].prompt == QUESTION
    assert read(GOOD | {"system": "S"}, Reading({}, ignore=frozenset({"system"})))[0][0].prompt == QUESTION


def test_a_strange_row_is_told_on_one_line_and_ends_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    strange = '{"prompt": "Q", "chosen": "A", "rejected": "B", "x\\u001b[2J\\n\\ud83d": "y"}\n'
    deep = '{"prompt": "Q", "chosen": "A", "rejected": "B", "x": ' + "[" * 800 + '"y"' + "]" * 800 + "}\n"
    path.write_text(json.dumps(GOOD) + "\n" + strange + deep)
    pairs, report = load_preferences(str(path))
    # How deep is too deep is for Python to say: where it reads on, the column is one that nobody knows.
    assert len(pairs) == 1 and report["left out: values nested too deeply"] == (sys.version_info < (3, 12))
    assert 'column "x\\x1b[2J\\n\\ud83d" is not understood' in report.reasons().split("\n")[0]
    assert all(line.isprintable() for line in json.dumps(report.notes).split("\n"))


def test_columns_are_named_by_the_user(tmp_path):
    rows = [{"q": f"Q{n}", "good": "A", "bad": "B"} for n in range(4)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        UserError, match=r'columns found are "q", "good", "bad".*\n?.*--config.data.columns=prompt=NAME'
    ):
        load_preferences(str(path))
    reading = Reading(columns.column_map("prompt=q, chosen=good,rejected=bad"))
    pairs, _ = load_preferences(str(path), reading=reading)
    assert [pair.prompt[0].content for pair in pairs] == ["Q0", "Q1", "Q2", "Q3"]
    for wrong in ("prompt", "prompt=", "prompt=a,prompt=b"):
        with pytest.raises(UserError, match="write name=column"):
            columns.column_map(wrong)


def test_of_ranked_answers_every_pair_can_be_taken():
    row = {
        "prompt": "Q",
        "answers": [{"answer": text, "score": n} for n, text in ((1, "C"), (3, "A"), (2, "B"), (2, "b"))],
    }
    assert {(one.chosen, one.rejected) for one in read(row)[0]} == {
        *(("A", "B"), ("A", "b"), ("A", "C"), ("B", "C"), ("b", "C")),
    }
    [one], counters = read(row, Reading({}))
    assert (one.chosen, one.rejected, counters["completions not used"]) == ("A", "C", 2)


# ------------------------------------------------------------------------------------------------ HH-RLHF


def hh(chosen, rejected="\n\nHuman: Q\n\nAssistant: B"):
    return read({"chosen": chosen, "rejected": rejected})


def test_an_answer_ends_where_the_user_speaks_again():
    [pair], counters = hh("\n\nHuman: Q\n\nAssistant: A\n\nHuman: Thanks")
    assert (pair.prompt, pair.chosen, pair.rejected) == (QUESTION, "A", "B")
    assert counters["answers cut where the user speaks again"] == 1
    prompt = {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A\n\nHuman: Thanks", "rejected": " B"}
    assert [(one.chosen, one.rejected) for one in read(prompt)[0]] == [("A", "B")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("\n\nAssistant: A", "\n\nAssistant: B", "assistant begins"),
        ("\n\nAssistant: Hi\n\nHuman: Q\n\nAssistant: A", "\n\nAssistant: Hi\n\nHuman: Q\n\nAssistant: B", "begins"),
        ("Human: Q\nAssistant: A", "Human: Q\nAssistant: B", "without blank lines"),
        ("\n\nHuman: Q\nAssistant: x\n\nAssistant: A", "\n\nHuman: Q\nAssistant: x\n\nAssistant: B", "inside a turn"),
        ("\n\nHuman: Q\n\nAssistant: A\nHuman: more", "\n\nHuman: Q\n\nAssistant: B", "inside a turn"),
    ],
)
def test_dialogues_that_are_written_badly_are_left_out(chosen, rejected, expected):
    assert expected in hh(chosen, rejected)[0][0].reason


def test_a_dialogue_without_the_blank_lines_before_it_is_read():
    [pair], _ = hh("Human: Q\n\nAssistant: A", "Human: Q\n\nAssistant: B")
    assert (pair.prompt, pair.chosen) == (QUESTION, "A")


# ------------------------------------------------------------------------------------------------ templates

NOTATIONS = {
    "ChatML": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "Llama 2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]",
    "Zephyr": "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n",
    "Gemma": "<bos><start_of_turn>system\nS<end_of_turn>\n<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
}
ENDS = {
    "ChatML": "<|im_end|>\n",
    "Llama 3": "<|eot_id|>",
    "Llama 2": "</s>",
    "Zephyr": "</s>",
    "Gemma": "<end_of_turn>",
}


@pytest.mark.parametrize("name", NOTATIONS)
def test_texts_that_carry_a_template_are_refused_or_stripped(tmp_path, name):
    prompt, end = NOTATIONS[name], ENDS[name]
    rows = [{"prompt": prompt, "chosen": f"A{n}{end}", "rejected": f"B{end}"} for n in range(10)]
    whole = [{key: prompt + row[key] for key in ("chosen", "rejected")} for row in rows]
    for data in (rows, whole):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        with pytest.raises(UserError, match=r"10 of 10 rows carry a chat template.*--config.data.strip_template=True"):
            load_preferences(str(path))
        pairs, _ = load_preferences(str(path), reading=Reading({}, strip_template=True))
        assert pairs[0].prompt == (Message("system", "S"), *QUESTION)
        assert [pair.chosen for pair in pairs] == [f"A{n}" for n in range(10)] and pairs[0].rejected == "B"


def test_a_single_row_that_carries_a_template_is_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [GOOD | {"chosen": f"A{n}"} for n in range(9)] + [GOOD | {"chosen": "A<|im_end|>"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, report = load_preferences(str(path))
    assert len(pairs) == 10 and report["rows that carry a chat template"] == 1


# ------------------------------------------------------------------------------------------------ judgement


def test_too_few_usable_rows_are_an_error_with_the_table_of_reasons(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [GOOD | {"chosen": f"A{n}"} for n in range(6)] + [GOOD | {"foo": "x", "bar": "y"}] * 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_preferences(str(path), reading=Reading({}, min_kept=0.6))[0]) == 6
    with pytest.raises(UserError) as error:
        load_preferences(str(path), reading=Reading({}, min_kept=0.7))
    message = str(error.value)
    assert "only 6 of 10 pairs can be used" in message and "config.data.min_kept=0.7" in message
    assert 'column "foo" is not understood: 4' in message and "a.jsonl:7; " in message and "a.jsonl:10" not in message
    assert "--config.data.ignore=foo,bar" in message


def test_answers_that_repeat_the_prompt_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    asked = "Tell me about tea, and do it well."
    path.write_text(json.dumps({"prompt": asked, "chosen": f"{asked} Green.", "rejected": "Tell me"}) + "\n")
    assert load_preferences(str(path))[1]["answers that repeat the prompt"] == 1


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
SIDES = {"prompt": '["Q"]', "response_b": '["b"]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (PAIR | {"weight": 10**400}, "weight"),
        ({"prompt": "Q", "response1": "a", "response2": "b", "overall_preference": 10**400}, "no verdict"),
        (PAIR | {"prompt": "[{'role': {[]: 1}}]"}, "stored as a text that cannot be read"),
        (SIDES | {"response_a": "[null]"}, "empty answer"),
        (SIDES | {"response_a": "[]"}, "empty answer"),
        ({"prompt": "Q", "response_1": "a", "response_2": "b", "label": "1"}, "no verdict"),
        (PAIR | {"prompt": float("nan"), "history": {}}, "prompt"),
    ],
)
def test_one_strange_value_costs_one_row(row, why):
    assert why in reason(row)


def test_history_may_be_stored_as_a_text():
    pair = read(PAIR | {"history": '[["a", "b"]]'})[0][0]
    assert pair.prompt == (Message("user", "a"), Message("assistant", "b"), Message("user", "Q"))


def test_a_column_that_no_row_has_takes_nothing_away():
    found = read(PAIR | {"system": "S"}, Reading({"system": "sistem"}))[0][0]
    assert found.prompt[0] == Message("system", "S")


def test_markers_amid_a_rendered_conversation_are_stripped():
    stripped = Reading({}, strip_template=True)
    turns = read(PAIR | {"prompt": "<s>[INST] Q [/INST] A0 </s><s>[INST] Q2 [/INST]"}, stripped)[0][0].prompt
    assert [turn.content for turn in turns] == ["Q", "A0", "Q2"]
    zephyr = "<|system|>\n</s>\n<|user|>\nQ</s>\n<|assistant|>\n"
    assert read(PAIR | {"prompt": zephyr}, stripped)[0][0].prompt == QUESTION
