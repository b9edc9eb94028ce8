"""Every file format gives the rows that .jsonl gives, lazily, and says where a file is damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from ctpd_jax.errors import UserError
from ctpd_jax.text import formats
from ctpd_jax.text.columns import LeftOut
from ctpd_jax.text.preferences import load_preferences

ROWS = [{"prompt": f'Q\u2028{n}\n"x", é', "chosen": "A" * n + "\r\n", "rejected": "B\t"} for n in range(1, 9)]


def as_csv(delimiter):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_parquet():
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out, row_group_size=3)
    return out.getvalue()


def zst(data):
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1).encode()
FILES = {
    "a.jsonl": LINES,
    "a.json": ARRAY,
    "bom.json": b"\xef\xbb\xbf" + ARRAY,
    "lines.json": LINES,  # misnamed
    "array.jsonl": ARRAY,  # misnamed
    "a.csv": as_csv(","),
    "semicolon.csv": b"\xef\xbb\xbf" + as_csv(";"),
    "a.tsv": as_csv("\t"),
    "a.parquet": as_parquet(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.gz": gzip.compress(ARRAY),
    "a.jsonl.zst": zst(LINES),
    "frames.jsonl.zst": zst(LINES[: len(LINES) // 2]) + zst(LINES[len(LINES) // 2 :]),
    "a.json.zst": zst(ARRAY),
    "a.csv.zst": zst(as_csv(",")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_pairs(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    pairs, report = load_preferences(str(tmp_path / name))
    assert [(p.prompt[0].content, p.chosen, p.rejected) for p in pairs] == [tuple(row.values()) for row in ROWS]
    assert pairs[-1].source == f"{tmp_path / name}:8" and report["rows"] == 8


def test_an_array_is_read_element_by_element(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK", 7)
    (tmp_path / "a.json").write_bytes(ARRAY)
    assert [pair.chosen for pair in load_preferences(str(tmp_path / "a.json"))[0]] == [row["chosen"] for row in ROWS]
    (tmp_path / "cut.json").write_bytes(ARRAY[:-40])
    with open(tmp_path / "cut.json", "rb") as file:  # the first rows come before the end has been looked at
        assert next(formats.rows_of(tmp_path / "cut.json", file)) == (1, ROWS[0])
    (tmp_path / "a.json").write_text('[{"prompt": "Q", "chosen": "A", "rejected": "B", "score": NaN}, 7, ["x"]]')
    pairs, report = load_preferences(str(tmp_path / "a.json"))
    assert len(pairs) == 1 and report["left out: not a JSON object"] == 2


DAMAGED = {
    "cut.json": (ARRAY[:-40], r"cut\.json:8: the array cannot be read on"),
    "two.json": (ARRAY + ARRAY, r"two\.json: something follows the array of 8 rows"),
    "object.json": (json.dumps({"data": ROWS}, indent=1).encode(), r"object\.json holds an object over several lines"),
    "cut.jsonl.zst": (zst(LINES)[:-9], r"cut\.jsonl\.zst:\d+: the file is damaged"),
    "bad.jsonl.zst": (b"no zstd at all", r"bad\.jsonl\.zst:1: the file is damaged"),
    "bad.parquet": (b"PAR1 no parquet", r"bad\.parquet:1: the file cannot be read as Parquet"),
    "twice.csv": (b"prompt,chosen,chosen\na,b,c\n", r"twice\.csv: two columns of the header have the same name"),
    "none.csv": (b"1,2\n3,4\n", r'none\.csv.*found the columns "1", "2"'),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, name):
    data, message = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_preferences(str(tmp_path / name))


def test_bad_rows_of_a_csv_are_left_out(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"prompt,chosen,rejected\nQ,A,B\nQ,A\nQ,A,B,more\nQ,\xff,B\nQ," + b"long" * 50_000 + b",B\n"
    )
    pairs, report = load_preferences(str(tmp_path / "a.csv"))
    assert [len(pair.chosen) for pair in pairs] == [1, 200_000]
    assert report.left_out == {
        "left out: empty answer": 1,
        'left out: column "(beyond the header)" is not understood': 1,
        "left out: text with a lone surrogate": 1,
    }


def test_shards_of_a_folder_are_read_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    for part in (1, 0):
        table = pyarrow.Table.from_pylist(ROWS[4 * part : 4 * part + 4])
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"train-0000{part}-of-00002.parquet")
    pairs, _ = load_preferences(str(tmp_path))
    assert [len(pair.chosen) for pair in pairs] == [len(row["chosen"]) for row in ROWS]
    assert pairs[4].source.endswith("train-00001-of-00002.parquet:1")


def test_a_picture_in_a_parquet_file_is_a_reason(tmp_path):
    rows = [{**ROWS[0], "image": {"bytes": b"\xff\xd8", "path": None}}, {**ROWS[1], "image": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs, report = load_preferences(str(tmp_path / "a.parquet"))
    assert len(pairs) == 1 and report['left out: column "image" is not understood'] == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_field_that_stands_twice_is_a_reason(tmp_path, name):
    row = '{"prompt": "Q", "chosen": "A", "rejected": "B", "rejected": "C"}'
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row)
    with pytest.raises(UserError, match=r'column "rejected \(twice\)" is not understood: 1'):
        load_preferences(str(tmp_path / name))


def test_a_broken_line_is_a_row_that_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n{not json\n[1]\n")
    with open(tmp_path / "a.jsonl", "rb") as file:
        found = list(formats.rows_of(tmp_path / "a.jsonl", file))
    assert [number for number, _ in found] == [1, 2, 3]
    assert [isinstance(row, LeftOut) for _, row in found] == [False, True, True]


def test_a_csv_is_read_to_the_letter(tmp_path):
    (tmp_path / "cut.csv").write_text('prompt,chosen,rejected\nq,a,b\nq2,"long answer one","long answ')
    with pytest.raises(UserError, match="never closed"):
        load_preferences(str(tmp_path / "cut.csv"))
    (tmp_path / "loose.csv").write_text('prompt,chosen,rejected\n"Hello" he said,a,b\nq,a,b\n')
    pairs, report = load_preferences(str(tmp_path / "loose.csv"))
    assert len(pairs) == 1 and report["left out: the row is no valid CSV"] == 1


def test_what_python_cannot_hold_of_a_parquet_file_is_a_number(tmp_path):
    texts = {"prompt": ["q", "q2"], "chosen": ["a", "a"], "rejected": ["b", "b"]}
    times = pyarrow.array([1, 10**18 + 7], pyarrow.timestamp("ns"))
    late = pyarrow.array([10**15, 1], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table(texts | {"made": times, "due": late}), tmp_path / "t.parquet")
    assert len(load_preferences(str(tmp_path / "t.parquet"))[0]) == 2
    twice = pyarrow.Table.from_arrays([pyarrow.array(["q"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="same name"):
        load_preferences(str(tmp_path / "twice.parquet"))
