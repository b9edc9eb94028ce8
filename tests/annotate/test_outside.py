"""What a server or a table tells of a teacher: the right tokens, or a sentence."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ctpd_jax.annotate.outside import Table, asked_logps, summed
from ctpd_jax.errors import UserError
from ctpd_jax.schema import Aligned, AlignedPair, TokenSide

PROMPT, RESPONSE = np.array([5, 6], np.int32), np.array([7, 8, 9], np.int32)


def listed(**changed):
    """What a server lists of those five tokens."""
    found = [None, *({str(token): {"logprob": -token / 8}, "3": {"logprob": -0.1}} for token in (6, 7, 8, 9))]
    for place, entry in changed.items():
        found[int(place[1:])] = entry
    return found


def told(monkeypatch, reply):
    monkeypatch.setattr("ctpd_jax.processes.server.asked", lambda session, url, path, body: reply)
    return asked_logps(None, "http://host/v1", "big", PROMPT, RESPONSE)


def test_the_log_probabilities_of_the_response(monkeypatch):
    values = told(monkeypatch, {"choices": [{"prompt_logprobs": listed()}]})
    np.testing.assert_array_equal(values, np.float32([-7 / 8, -1, -9 / 8]))


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ({"choices": [{"text": "x"}]}, "answers without prompt_logprobs"),
        ({"choices": []}, "answers without prompt_logprobs"),
        (["x"], "answers without prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": listed()[1:]}]}, "was sent 5 tokens and tells of 4"),
        ({"choices": [{"prompt_logprobs": listed(p3={"1": {"logprob": -1.0}})}]}, "token 8 at place 3 and tells of 1:"),
        ({"choices": [{"prompt_logprobs": listed(p4=None)}]}, "token 9 at place 4 and tells of None"),
    ],
)
def test_a_server_that_answers_something_else(monkeypatch, reply, sentence):
    with pytest.raises(UserError, match=sentence):
        told(monkeypatch, reply)


def test_numbers_of_tokens_are_summed_and_numbers_of_spans_are_kept():
    spans = np.array([0, 1, 1, 2], np.int32)
    np.testing.assert_array_equal(summed("it", [-1, -2, -3, -4], spans), np.float32([-1, -5, -4]))
    np.testing.assert_array_equal(summed("it", [-1, -5, -4], spans), np.float32([-1, -5, -4]))
    for wrong, sentence in (
        ([-1.0], "it: 1 log-probabilities for 4 tokens in 3 spans"),
        ([-1, np.nan, -1], "nan is no log-probability"),
        ([-1, -np.inf, -1], "-inf is no log-probability"),
        ([0.3, 0.2, 0.5], "0.3 is no log-probability"),
    ):
        with pytest.raises(UserError, match=sentence):
            summed("it", wrong, spans)


PAIR = AlignedPair(
    "one", PROMPT, PROMPT,
    Aligned(np.arange(4), TokenSide(RESPONSE, np.arange(3)), TokenSide(RESPONSE, np.arange(3))),
    Aligned(np.arange(2), TokenSide(RESPONSE[:2], np.zeros(2, int)), TokenSide(RESPONSE[:1], np.zeros(1, int))),
    3, 1, (False, False),
)  # fmt: skip
ROW = {"id": "one", "chosen_teacher_ids": [7, 8, 9], "rejected_teacher_ids": [7, 8], "teacher_prompt": [5, 6]}
ROW |= {"chosen_reference": [-1.0, -2.0, -3.0], "rejected_reference": [-1.0, -2.0]}


def table_of(tmp_path, rows, columns=("reference",)):
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return Table(path, columns)


def test_a_row_gives_both_responses(tmp_path):
    chosen, rejected = table_of(tmp_path, [ROW | {"id": "other"}, ROW]).logps(PAIR, "reference", None)
    assert chosen.tolist() == [-1, -2, -3] and rejected.tolist() == [-3] and chosen.dtype == np.float32


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"id": "two"}, "has no row of pair one"),
        (
            {"chosen_teacher_ids": [7, 8, 1]},
            "chosen_teacher_ids of pair one are not the teacher's tokens here, from place 2",
        ),
        (
            {"rejected_teacher_ids": [7]},
            "rejected_teacher_ids of pair one are not the teacher's tokens here, from place 1",
        ),
        ({"teacher_prompt": [1, 5, 6]}, "teacher_prompt of pair one are not"),
        ({"chosen_reference": [-1.0]}, "chosen_reference of pair one: 1 log-probabilities for 3 tokens in 3 spans"),
        ({"rejected_reference": None, "id": "one"}, "rejected_reference holds null, not lists of numbers"),
        ({"chosen_reference": "x"}, "chosen_reference holds string, not lists of numbers"),
        ({"chosen_reference": [-1.0, 0.5, -1.0]}, "0.5 is no log-probability"),
    ],
)
def test_a_row_that_is_of_something_else(tmp_path, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        table_of(tmp_path, [ROW | changed]).logps(PAIR, "reference", None)


def test_a_file_that_is_no_such_table(tmp_path):
    with pytest.raises(UserError, match="has no column chosen_positive; it has id"):
        table_of(tmp_path, [ROW], ("reference", "positive"))
    with pytest.raises(UserError, match="has two rows of pair one"):
        table_of(tmp_path, [ROW, ROW])
    with pytest.raises(UserError, match="There is no table"):
        Table(tmp_path / "none.parquet", ())
    (tmp_path / "text.parquet").write_text("PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        Table(tmp_path / "text.parquet", ())
    empty = ROW | {"rejected_reference": None}
    with pytest.raises(UserError, match="0 log-probabilities for 2 tokens"):  # one row lacks what others have
        table_of(tmp_path, [ROW | {"id": "other"}, empty]).logps(PAIR, "reference", None)
