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
        ({"choices": [{"prompt_logprobs": listed(p1={"1": {"logprob": -1.0}})}]}, "token 6 at place 1 and tells of 1:"),
        ({"choices": [{"prompt_logprobs": listed(p4={"9": -1.0})}]}, "lists -1.0 for a token; its logprob has to be a"),
    ],
)
def test_a_server_that_answers_something_else(monkeypatch, reply, sentence):
    with pytest.raises(UserError, match=sentence):
        told(monkeypatch, reply)


@pytest.mark.parametrize("value", ["-0.5", False, None, [-0.5]])
def test_what_is_no_number_is_not_taken_for_one(monkeypatch, value):
    with pytest.raises(UserError, match="for a token; its logprob has to be a number"):
        told(monkeypatch, {"choices": [{"prompt_logprobs": listed(p4={"9": {"logprob": value}})}]})


@pytest.mark.parametrize("value", [0.5, float("nan"), float("-inf"), -9999.0, -(10**400), 10**400])
def test_a_number_that_is_no_log_probability(monkeypatch, value):
    with pytest.raises(UserError, match=r"lists a logprob of .*; it has to be finite, and at most 0"):
        told(monkeypatch, {"choices": [{"prompt_logprobs": listed(p4={"9": {"logprob": value}})}]})


def test_numbers_of_tokens_are_summed_and_numbers_of_spans_are_kept():
    spans = np.array([0, 1, 1, 2], np.int32)
    np.testing.assert_array_equal(summed("it", [-1, -2, -3, -4], spans), np.float32([-1, -5, -4]))
    np.testing.assert_array_equal(summed("it", [-1, -5, -4], spans), np.float32([-1, -5, -4]))
    for wrong, sentence in (
        ([-1.0], "it: 1 log-probabilities for 4 tokens in 3 spans"),
        ([-1, np.nan, -1], "nan is no log-probability"),
        ([-1, -np.inf, -1], "-inf is no log-probability"),
        ([0.3, 0.2, 0.5], "0.3 is no log-probability"),
        ([-1, -1e300, -1], r"-1e\+300 is no log-probability"),  # float32 has no such number
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


def of_type(tmp_path, name="table.parquet", **columns):
    """The row as a table with some columns of other types; None: without the column."""
    arrays = {key: pyarrow.array([value]) for key, value in ROW.items()} | columns
    kept = {key: array for key, array in arrays.items() if array is not None}
    pyarrow.parquet.write_table(pyarrow.table(kept), tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    "changed",
    [
        {"chosen_teacher_ids": pyarrow.array([[7, 8, 9]], pyarrow.list_(pyarrow.uint8()))},
        {"chosen_teacher_ids": pyarrow.array([[7, 8, 9]], pyarrow.large_list(pyarrow.uint64()))},
        {"chosen_reference": pyarrow.array([[-1, -2, -3]], pyarrow.list_(pyarrow.float64(), 3))},
        {"chosen_reference": pyarrow.array([np.float16([-1, -2, -3])], pyarrow.list_(pyarrow.float16()))},
        {"id": pyarrow.array(["one"]).dictionary_encode()},
        {
            "rejected_reference": pyarrow.array([[-3.0]]),
            "rejected_teacher_span_ids": pyarrow.array([[0, 0]]),
            "chosen_teacher_span_ids": pyarrow.array([[0, 9, 9]]),  # of another student: not read, as tokens are told
        },
    ],
)
def test_columns_of_other_types(tmp_path, changed):
    chosen, rejected = Table(of_type(tmp_path, **changed), ["reference"]).logps(PAIR, "reference", None)
    assert chosen.tolist() == [-1, -2, -3] and rejected.tolist() == [-3]


def bad_utf8():
    offsets, data = np.array([0, 2], np.int32), b"\xff\xfe"
    return pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(offsets.tobytes()), pyarrow.py_buffer(data))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"chosen_reference": pyarrow.array([-1.0])}, "chosen_reference holds double, not lists of numbers"),
        ({"chosen_reference": pyarrow.array([[True, False, True]])}, "holds list<.*bool>, not lists of numbers"),
        ({"chosen_reference": pyarrow.array([[-1.0, None, -3.0]])}, "nan is no log-probability"),
        ({"chosen_teacher_ids": pyarrow.array([[7, None, 9]])}, "from place 1 of 3 on"),
        ({"chosen_teacher_ids": pyarrow.array([[7, 8, -9]], pyarrow.list_(pyarrow.int16()))}, "from place 2 of 3 on"),
        ({"id": pyarrow.array([b"one"])}, "id holds binary, not strings or integers"),
        ({"id": bad_utf8()}, "cannot be read as Parquet: 'utf-8' codec"),
        (
            {"rejected_reference": pyarrow.array([[-3.0]]), "rejected_teacher_span_ids": pyarrow.array([[0, 1]])},
            "rejected_teacher_span_ids of pair one are not the teacher's tokens here, from place 1",
        ),
    ],
)
def test_a_column_that_is_of_something_else(tmp_path, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        Table(of_type(tmp_path, **changed), ["reference"]).logps(PAIR, "reference", None)


def test_a_folder_is_one_table_and_its_files_are_alike(tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    with pytest.raises(UserError, match="is a folder without a Parquet file"):
        Table(folder, ["reference"])
    of_type(folder, "a.parquet", id=pyarrow.array(["other"]))
    of_type(folder, "b.parq")
    (folder / "_SUCCESS").touch()
    table = Table(folder, ["reference"])
    assert table.logps(PAIR, "reference", None)[1].tolist() == [-3]
    assert len(table.source.files) == 2  # those whose bytes identify it, whatever their names end with
    for changed, sentence in (
        ({"chosen_reference": None}, "c.parquet has no column chosen_reference"),  # it would be read as nulls
        ({"teacher_prompt": None}, "c.parquet has no column teacher_prompt"),  # or not be compared
        ({"chosen_reference": pyarrow.array([np.float16([-1])])}, "c.parquet: .* holds list<.*; write both as one"),
    ):
        of_type(folder, "c.parquet", id=pyarrow.array(["more"]), **changed)
        with pytest.raises(UserError, match=sentence):
            Table(folder, ["reference"])


def test_a_column_that_is_there_twice(tmp_path):
    table = pyarrow.parquet.read_table(of_type(tmp_path))
    twice = pyarrow.Table.from_arrays([*table.columns, table["id"]], [*table.column_names, "id"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="has 2 columns id"):
        Table(tmp_path / "twice.parquet", ["reference"])
