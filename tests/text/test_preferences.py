"""Every layout that people bring, every trap in it, and messages that name the line."""

import gzip
import json
import re
import sys
import types

import numpy as np
import pytest

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Counters, Message
from ctpd_jax.text import preferences
from ctpd_jax.text.columns import Reading
from ctpd_jax.text.preferences import load_preferences, load_prompts
from ctpd_jax.text.read_row import read_row

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def said(*turns):
    """("u", text) ... as the dicts of a message list."""
    roles = {"u": USER, "a": ASSISTANT, "s": SYSTEM}
    return [{"role": roles[role], "content": text} for role, text in turns]


def write(path, *rows):
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return str(path)


def only(tmp_path, row, **options):
    """The one pair that a file with this row holds."""
    pairs, _ = load_preferences(write(tmp_path / "one.jsonl", row), **options)
    assert len(pairs) == 1
    return pairs[0]


# ------------------------------------------------------------------------------------------------ layouts


def test_strings_are_kept_to_the_character(tmp_path):
    pair = only(tmp_path, {"prompt": " Why? \n", "chosen": "  Because\u2028so. ", "rejected": "\tNo\r\n"})
    assert pair.prompt == (Message(USER, " Why? \n"),)
    assert (pair.chosen, pair.rejected) == ("  Because\u2028so. ", "\tNo\r\n")
    assert pair.source.endswith("one.jsonl:1")


LAYOUTS = {
    "prompt as messages, answers as texts": {"prompt": said(("s", "S"), ("u", "Q")), "chosen": "A", "rejected": "B"},
    "prompt as messages, answers as one message": {
        "prompt": said(("s", "S"), ("u", "Q")),
        "chosen": said(("a", "A")),
        "rejected": said(("a", "B")),
    },
    "whole conversations": {
        "chosen": said(("s", "S"), ("u", "Q"), ("a", "A")),
        "rejected": said(("s", "S"), ("u", "Q"), ("a", "B")),
    },
    "conversations that repeat the prompt": {
        "prompt": said(("s", "S"), ("u", "Q")),
        "chosen": said(("s", "S"), ("u", "Q"), ("a", "A")),
        "rejected": said(("s", "S"), ("u", "Q"), ("a", "B")),
    },
    "conversations that repeat its end": {
        "prompt": said(("s", "S"), ("u", "Q")),
        "chosen": said(("u", "Q"), ("a", "A")),
        "rejected": said(("u", "Q"), ("a", "B")),
    },
    "UltraFeedback Binarized": {
        "prompt": "Q",
        "prompt_id": "0c",
        "chosen": said(("s", "S"), ("u", "Q"), ("a", "A")),
        "rejected": said(("s", "S"), ("u", "Q"), ("a", "B")),
        "messages": said(("u", "Q"), ("a", "A")),
        "score_chosen": 8.5,
        "score_rejected": 8.0,
    },
    "NeMo": {
        "context": said(("s", "S"), ("u", "Q")),
        "completions": [
            {"rank": 1, "completion": said(("a", "B"))},
            {"rank": 0, "completion": said(("a", "A"))},
        ],
    },
    "system and question": {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
    "ShareGPT": {
        "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    "parts of text": {
        "prompt": [*said(("s", "S")), {"role": "user", "content": [{"type": "text", "text": "Q"}]}],
        "chosen": "A",
        "rejected": "B",
    },
    "records of lists": {
        "chosen": {"role": [SYSTEM, USER, ASSISTANT], "content": ["S", "Q", "A"]},
        "rejected": {"role": [SYSTEM, USER, ASSISTANT], "content": ["S", "Q", "B"]},
    },
}


@pytest.mark.parametrize(
    ("columns", "weight", "margin"),
    [
        ({}, 1.0, None),
        ({"weight": 0.25, "margin": -1}, 0.25, -1.0),
        ({"weight": "2", "score_chosen": 8.5, "score_rejected": "8"}, 2.0, 0.5),
        ({"score_chosen": 8.5}, 1.0, None),
    ],
)
def test_what_a_row_says_of_its_worth(tmp_path, columns, weight, margin):
    pair = only(tmp_path, {"prompt": "Q", "chosen": "A", "rejected": "B"} | columns)
    assert (pair.weight, pair.margin) == (weight, margin)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_pair(tmp_path, name):
    pair = only(tmp_path, LAYOUTS[name])
    assert pair.prompt == (Message(SYSTEM, "S"), Message(USER, "Q"))
    assert (pair.chosen, pair.rejected) == ("A", "B")


def test_a_longer_conversation_is_divided_at_its_last_message(tmp_path):
    turns = ("u", "Paris?"), ("a", "Yes."), ("u", "And?")
    row = {"chosen": said(*turns, ("a", "Pari")), "rejected": said(*turns, ("a", "Paris"))}
    pair = only(tmp_path, row)
    assert [message.content for message in pair.prompt] == ["Paris?", "Yes.", "And?"]
    assert (pair.chosen, pair.rejected) == ("Pari", "Paris")  # no common prefix taken off


def test_hh_rlhf_is_divided_at_the_last_assistant(tmp_path):
    head = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a city:\n1."
    row = {"chosen": head + "\n\nAssistant: Paris", "rejected": head + "\n\nAssistant: Pa\n\nris"}
    pair = only(tmp_path, row)
    assert pair.prompt == (Message(USER, "Hi"), Message(ASSISTANT, "Hello."), Message(USER, "Name a city:\n1."))
    assert (pair.chosen, pair.rejected) == ("Paris", "Pa\n\nris")


def test_a_prompt_column_in_hh_notation_is_a_dialogue(tmp_path):
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:", "chosen": "A", "rejected": "B"}
    assert only(tmp_path, row).prompt == (Message(USER, "Hi"), Message(ASSISTANT, "Hello."), Message(USER, "Bye"))


def test_a_declared_separator_divides_texts(tmp_path):
    pair = only(tmp_path, {"chosen": "POST x\nTL;DR: a", "rejected": "POST x\nTL;DR: b"}, separator="\nTL;DR:")
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message(USER, "POST x"),), "a", "b")


def test_an_empty_prompt_is_an_unconditional_text(tmp_path):
    assert only(tmp_path, {"prompt": "", "chosen": "A", "rejected": "B"}).prompt == ()


def test_instruction_and_input_make_one_message(tmp_path):
    row = {"instruction": "Translate.", "input": "Hund", "chosen": "dog", "rejected": "cat"}
    assert only(tmp_path, row).prompt == (Message(USER, "Translate.\nHund"),)


def test_of_many_ranks_the_best_and_the_worst_are_taken_and_the_rest_is_counted(tmp_path):
    completions = [{"rank": rank, "completion": text} for rank, text in ((2, "C"), (0, "A"), (1, "B"))]
    row = {"context": "Q", "completions": completions}
    pairs, report = load_preferences(write(tmp_path / "a.jsonl", row))
    assert (pairs[0].chosen, pairs[0].rejected) == ("A", "C")
    assert report["completions not used"] == 1


def test_a_prompt_column_that_contradicts_the_conversation_is_counted(tmp_path):
    row = {"prompt": "other", "chosen": said(("u", "Q"), ("a", "A")), "rejected": said(("u", "Q"), ("a", "B"))}
    pairs, report = load_preferences(write(tmp_path / "a.jsonl", row))
    assert pairs[0].prompt == (Message(USER, "Q"),)
    assert report["prompt column differs from the conversation"] == 1


def test_bytes_and_arrays_of_tfds_become_text():
    turns = np.array([b"user", b"assistant"], object)
    row = {
        "chosen": {"role": turns, "content": np.array([b"Q", "é".encode()], object)},
        "rejected": {"role": turns, "content": np.array([b"Q", b"B"], object)},
        "score_chosen": np.float32(1),
    }
    [pair] = read_row(row, "\n\nAssistant:", Counters())
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message(USER, "Q"),), "é", "B")
    assert type(pair.chosen) is str


# ------------------------------------------------------------------------------------------------ left out


def test_useless_pairs_are_left_out_and_counted(tmp_path):
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    spec = write(
        tmp_path / "a.jsonl",
        good,
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "", "rejected": "A"},
        {"prompt": "Q", "chosen": "A", "rejected": " \n"},
        {"prompt": "Q", "chosen": "A", "rejected": None},
        {"chosen": said(("u", "Q"), ("a", "A")), "rejected": said(("u", "R"), ("a", "B"))},
        {"chosen": said(("u", "Q"), ("a", "A")), "rejected": []},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: R\n\nAssistant: B"},
        {"context": "Q", "completions": [{"rank": 0, "completion": "A"}, {"rank": 0, "completion": "B"}]},
        {**good, "rejected": "half a pair: \\ud83d"},
    )
    text = (tmp_path / "a.jsonl").read_text().replace("\\\\ud83d", "\\ud83d")
    (tmp_path / "a.jsonl").write_text(text)
    pairs, report = load_preferences(spec)
    assert [pair.chosen for pair in pairs] == ["A"]
    assert report.counts == {
        "rows": 10,
        "kept": 1,
        "left out: identical answers": 1,
        "left out: empty answer": 4,
        "left out: the answers follow different prompts": 2,
        "left out: completions of one rank": 1,
        "left out: text with a lone surrogate": 1,
    }


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    spec = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "A"})
    with pytest.raises(UserError, match=r"no usable preference pair.*identical answers: 1"):
        load_preferences(spec)


# ------------------------------------------------------------------------------------------------ ids, limit, lines


def test_ids_follow_the_texts_and_not_the_order(tmp_path):
    rows = [{"prompt": "Q", "chosen": f"A{n}", "rejected": "B", "score_chosen": n} for n in range(3)]
    forward, _ = load_preferences(write(tmp_path / "f.jsonl", *rows))
    backward, _ = load_preferences(write(tmp_path / "b.jsonl", *rows[::-1]))
    assert {pair.chosen: pair.id for pair in forward} == {pair.chosen: pair.id for pair in backward}
    assert len({pair.id for pair in forward}) == 3
    swapped = only(tmp_path, {"prompt": "Q", "chosen": "B", "rejected": "A0"})
    assert swapped.id not in {pair.id for pair in forward}


def test_roles_are_part_of_the_id(tmp_path):
    as_user = only(tmp_path, {"prompt": said(("u", "Q")), "chosen": "A", "rejected": "B"})
    as_system = only(tmp_path, {"prompt": said(("s", "Q")), "chosen": "A", "rejected": "B"})
    assert as_user.id != as_system.id


def test_exact_repeats_keep_ids_of_their_own(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    pairs, report = load_preferences(write(tmp_path / "a.jsonl", row, row, row))
    assert [pair.id for pair in pairs] == [pairs[0].id, f"{pairs[0].id}-2", f"{pairs[0].id}-3"]
    assert report["exact repeats"] == 2


def test_the_limit_counts_kept_pairs(tmp_path):
    rows = [{"prompt": "Q", "chosen": text, "rejected": "A"} for text in "ABCD"]
    pairs, report = load_preferences(write(tmp_path / "a.jsonl", *rows), limit=2)
    assert [pair.chosen for pair in pairs] == ["B", "C"]
    assert report["rows"] == 3
    with pytest.raises(UserError, match="at least 1"):
        load_preferences(str(tmp_path / "a.jsonl"), limit=0)


def test_lines_end_at_newlines_only(tmp_path):
    row = {"prompt": "a\u2028b\u0085c", "chosen": "A\x0b", "rejected": "B\x1c"}
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n  \n")
    pairs, report = load_preferences(str(tmp_path / "a.jsonl"))
    assert pairs[0].prompt[0].content == "a\u2028b\u0085c"
    assert report["rows"] == 1


def test_files_folders_and_splits(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    write(tmp_path / "train.jsonl", row)
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps({**row, "chosen": "T"}).encode()))
    assert load_preferences(str(tmp_path))[0][0].chosen == "A"
    assert load_preferences(str(tmp_path), split="test")[0][0].chosen == "T"
    assert load_preferences(str(tmp_path / "{split}.jsonl.gz"), split="test")[0][0].chosen == "T"
    with pytest.raises(UserError, match=r"neither dev\.jsonl nor dev\.jsonl\.gz"):
        load_preferences(str(tmp_path), split="dev")


def test_the_share_of_test_data_in_the_training_data(tmp_path):
    rows = [{"prompt": f"Q{n}", "chosen": "A", "rejected": "B"} for n in range(4)]
    train, _ = load_preferences(write(tmp_path / "train.jsonl", *rows, rows[0]))
    test = [rows[0], rows[0], {**rows[1], "chosen": "other"}, {**rows[1], "prompt": "new"}]
    held_out, _ = load_preferences(write(tmp_path / "test.jsonl", *test))
    assert preferences.overlap(train, held_out) == {"pairs": 0.5, "prompts": 0.75}


# ------------------------------------------------------------------------------------------------ errors


BROKEN = {
    "not valid JSON": b'{"prompt": "Q"',
    "not a JSON object": b'["prompt"]',
    "not valid UTF-8": b'{"prompt": "\xff"}',
    'found the columns "prompt", "completion", "label"': b'{"prompt": "Q", "completion": "A", "label": true}',
    "so the prompt is unknown": b'{"chosen": "A", "rejected": "B"}',
    "hold token ids": b'{"prompt": "Q", "chosen": [1, 2], "rejected": [3]}',
    r'"chosen_input_ids".*hold token ids': b'{"chosen_input_ids": [1], "rejected_input_ids": [2]}',
    "must both be texts": b'{"prompt": "Q", "chosen": "A", "rejected": [{"role": "assistant", "content": "B"}]}',
    "the role 'tool'": b'{"prompt": [{"role": "tool", "content": "x"}], "chosen": "A", "rejected": "B"}',
    'field of a message "tool_calls" is not understood': b'{"prompt": [{"role": "assistant", "content": "", '
    b'"tool_calls": [{}]}], "chosen": "A", "rejected": "B"}',
    'last message of "chosen" is by "user"': b'{"prompt": "Q", "chosen": [{"role": "user", "content": "A"}], '
    b'"rejected": [{"role": "assistant", "content": "B"}]}',
    "must be text": b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "A", "rejected": "B"}',
    "expected a text or a list of messages": b'{"prompt": "Q", "chosen": NaN, "rejected": NaN}',
    'needs a number "rank"': b'{"context": "Q", "completions": [{"completion": "A"}, {"completion": "B"}]}',
    "at least two": b'{"context": "Q", "completions": [{"rank": 0, "completion": "A"}]}',
    "neither repeat nor continue": b'{"prompt": [{"role": "user", "content": "X"}], "chosen": [{"role": "user", '
    b'"content": "Q"}, {"role": "assistant", "content": "A"}], "rejected": [{"role": "user", "content": "Q"}, '
    b'{"role": "assistant", "content": "B"}]}',
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_bad_line_is_left_out_and_named(tmp_path, message):
    good = json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}).encode()
    (tmp_path / "bad.jsonl").write_bytes(good + b"\n\n" + BROKEN[message] + b"\n")
    pairs, report = load_preferences(str(tmp_path / "bad.jsonl"))
    assert [pair.chosen for pair in pairs] == ["A"]
    assert list(report.left_out.values()) == [1]
    assert re.search(message, report.reasons()) and "bad.jsonl:3" in report.reasons()


WHOLE = gzip.compress(b"".join(b'{"prompt": "Q", "chosen": "A%d", "rejected": "B"}\n' % n for n in range(50)), mtime=0)


@pytest.mark.parametrize(
    "damaged",
    [
        WHOLE[:-12],  # cut short
        b"{}" + WHOLE[2:],  # another format
        WHOLE[:10] + b"\xff" * 20 + WHOLE[30:],  # zlib cannot go on
        WHOLE[:-8] + b"\x00" * 8,  # the checksum at the end
    ],
    ids=["cut", "head", "middle", "checksum"],
)
def test_a_damaged_gzip_file_is_named(tmp_path, damaged):
    (tmp_path / "a.jsonl.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: the compressed file is damaged"):
        load_preferences(str(tmp_path / "a.jsonl.gz"))


def test_a_file_that_must_not_be_read_is_named(tmp_path, monkeypatch):
    spec = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B"})

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(preferences, "open", refuse, raising=False)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Permission denied"):
        load_preferences(spec)


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}"], ids=["nested", "digits"])
def test_json_that_python_does_not_read_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line)
    with pytest.raises(UserError, match=r"the line cannot be read as JSON: 1 \(.*a\.jsonl:1"):
        load_preferences(str(tmp_path / "a.jsonl"))


class NoNetwork(Exception):
    """As of an HTTP client: neither an OSError nor a ValueError."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("no route to host\nlong trace"),
            r'"owner/name".*ConnectionError: no route to host\).*network',
        ),
        (TimeoutError(), r"\(TimeoutError\)\. Check the network"),
        (NoNetwork("502 for https://x"), r"NoNetwork: 502 for https://x"),
        (FileNotFoundError("no data set owner/name"), r"FileNotFoundError: no data set owner/name\)\.$"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_an_error_of_one_line(monkeypatch, error, message):
    def load_dataset(name, config, split):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=message) as raised:
        load_preferences("hf:owner/name")
    assert "\n" not in str(raised.value)


def test_a_download_of_tfds_that_fails_is_an_error_of_one_line(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    class Builder:
        def __init__(self, name, data_dir):
            pass

        def download_and_prepare(self, file_format):
            raise NoNetwork("https://x: refused\nlong trace")

    monkeypatch.setattr(tfds, "builder", Builder)
    with pytest.raises(UserError, match=r'TFDS cannot open "name", split "train" \(NoNetwork: https://x: refused\)\.$'):
        load_preferences("tfds:name", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/file.jsonl", "no preference file"),
        ("tfds:no_such_data_set", "TFDS cannot open"),
        ("tfds:no.such.module:name", "No module named"),
        ("hf:owner/name", "install ctpd-jax.hub."),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, spec, message):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(UserError, match=message):
        load_preferences(spec, data_dir=tmp_path)


def test_other_file_types_are_refused(tmp_path):
    (tmp_path / "a.xlsx").write_text("prompt,chosen,rejected\n")
    with pytest.raises(UserError, match=r"not a \.jsonl file nor one of .*\.parquet"):
        load_preferences(str(tmp_path / "a.xlsx"))


def test_the_hub_is_asked_for_name_config_and_split(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"prompt": "Q", "chosen": "A", "rejected": "B"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    pairs, _ = load_preferences("hf:owner/name:part", split="train[:5]")
    assert asked == [("owner/name", "part", "train[:5]")]
    assert pairs[0].source == "hf:owner/name:part[train[:5]]:0"


def test_columns_of_bytes_are_judged_by_their_text(monkeypatch):
    """As TFDS hands them out."""
    row = {"prompt": b"Q", "chosen": b"<|im_start|>A", "rejected": b"B", "topic": 3}
    monkeypatch.setattr(preferences, "_rows", lambda *arguments: iter([("tfds:x:0", row), ("tfds:x:1", row)]))
    with pytest.raises(UserError, match="strip_template"):
        load_preferences("tfds:x")


def test_prompts_are_read_with_and_without_answers(tmp_path):
    """Distinct prompts in the order of the file; a file of pairs, of swapped pairs and of prompts say the same."""
    asked = ["Tea?", "Bread?", "Tea?", "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:"]
    alone = [{"prompt": text, "source_id": number} for number, text in enumerate(asked)]
    alone.append({"system": "Be brief.", "messages": [{"role": "user", "content": "Salt?"}]})
    pairs = [row | {"chosen": "good", "rejected": "bad"} for row in alone]
    swapped = [row | {"chosen": "bad", "rejected": "good"} for row in alone]
    found = []
    for name, rows in {"alone": alone, "pairs": pairs, "swapped": swapped}.items():
        path = write(tmp_path / f"{name}.jsonl", *rows)
        found.append(load_prompts(path, "train", None))
    assert found[0][0] == found[1][0] == found[2][0]
    prompts, report = found[0]
    assert [prompt[-1].content for prompt in prompts] == ["Tea?", "Bread?", "Tea?", "Salt?"]
    assert [len(prompt) for prompt in prompts] == [1, 1, 3, 2] and prompts[3][0] == Message("system", "Be brief.")
    assert report["rows"] == 5 and report["distinct prompts"] == 4
    assert load_prompts(path, "train", 2)[0] == prompts[:2]


def test_what_holds_no_prompt_is_counted(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Tea?"}, {"prompt": "Tea?", "image": "x.png"}, {"chosen": "a", "rejected": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{not json\n")
    prompts, report = load_prompts(str(path), "train", None)
    assert len(prompts) == 1 and sum(report.left_out.values()) == 3
    with pytest.raises(UserError, match="only 1 of 4"):
        load_prompts(str(path), "train", None, Reading({}, min_kept=0.5))
