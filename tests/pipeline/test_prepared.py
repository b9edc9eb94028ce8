"""Prepared pairs on disk: the same as they were made, made once, made anew where anything is different."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import MICRO
from helpers.jobs import job_in

from ctpd_jax.cli import load_config
from ctpd_jax.job import pairs as of_job
from ctpd_jax.job import prepared
from ctpd_jax.schema import Counters

FILES = {"values.npy", "ends.npy", "numbers.npy", "worth.npy", "told.json", "seal.json"}


def fields(pair) -> list:
    """All that a pair holds, in plain Python, so that two can be compared."""
    found = dataclasses.asdict(dataclasses.replace(pair, chosen=None, rejected=None))
    plain = [value.tolist() if isinstance(value, np.ndarray) else value for value in found.values()]
    for side in (0, 1):
        own = pair.response(side)
        arrays = [own.bounds, own.teacher.ids, own.teacher.span_ids, own.student.ids, own.student.span_ids]
        assert all(array.dtype == np.int32 for array in arrays)
        plain.append([array.tolist() for array in arrays])
    return plain


@pytest.fixture
def job(tmp_path):
    return job_in(tmp_path / "run", load_config(MICRO, []))


@pytest.fixture
def count(monkeypatch):
    """How often pairs were tokenized."""
    calls, real = [], of_job.prepare_pairs
    monkeypatch.setattr(of_job, "prepare_pairs", lambda *given: calls.append(1) or real(*given))
    return calls


def again(job, **changes):
    """The pairs as another process of this workdir would load them."""
    of_job.load_pairs.cache_clear()
    return of_job.load_pairs(dataclasses.replace(job, **changes), "train")


def test_what_comes_back_is_what_was_prepared(job, monkeypatch, count):
    written = []
    real = prepared.write
    monkeypatch.setattr(prepared, "write", lambda *given: written.append(given) or real(*given))
    first = again(job)
    ((folder, made, _, _),) = written
    assert {path.name for path in folder.iterdir()} == FILES
    assert isinstance(first.aligned, prepared.PreparedPairs) and len(first.aligned) == len(made) > 3
    assert list(map(fields, first.aligned)) == list(map(fields, made))
    assert fields(first.aligned[-1]) == fields(made[-1])
    assert list(map(fields, first.aligned[1:9:2])) == list(map(fields, made[1:9:2]))
    with pytest.raises(IndexError):
        first.aligned[len(made)]
    assert not first.aligned[0].teacher_prompt.flags.writeable  # it is the file

    told = (job.workdir / "data_train.json").read_bytes()
    second = again(job)
    assert len(count) == 1 and second.identity == first.identity
    assert list(map(fields, second.aligned)) == list(map(fields, made))
    assert (job.workdir / "data_train.json").read_bytes() == told  # what was counted comes back too


def test_a_margin_a_weight_and_a_cut_come_back(tmp_path, job):
    pair = dataclasses.replace(again(job).aligned[0], weight=0.25, margin=-1.5, truncated=(False, True), dropped=7)
    counters = Counters({"pairs": 1}, {"left out: \ud800": ["row 3"]})
    prepared.write(tmp_path / "own", [pair], counters, {"of": "this"})
    ((back,), counted) = prepared.read(tmp_path / "own", {"of": "this"})
    assert fields(back) == fields(pair) and counted == counters


@pytest.mark.parametrize("what", ["limit", "text", "byte", "seal", "end"])
def test_anything_else_is_prepared_anew(job, count, what, tmp_path):
    again(job)
    folder = job.workdir / "prepared" / "train"
    if what == "limit":
        job.config.data.max_response_tokens -= 1
    elif what == "text":
        rows = Path(job.config.data.train).read_text().splitlines(keepends=True)
        (tmp_path / "rows.jsonl").write_text("".join(rows[1:]))
        job.config.data.train = str(tmp_path / "rows.jsonl")
    elif what == "byte":
        data = bytearray((folder / "values.npy").read_bytes())
        data[-1] ^= 1
        (folder / "values.npy").write_bytes(data)
    elif what == "end":
        (folder / "values.npy").write_bytes((folder / "values.npy").read_bytes()[:-4])
    else:
        (folder / "seal.json").write_text("{}")
    found = again(job)
    assert len(count) == 2
    assert list(map(fields, again(job).aligned)) == list(map(fields, found.aligned)) and len(count) == 2


def test_who_only_looks_writes_nothing(job, count):
    found = again(job, looks_only=True)
    assert isinstance(found.aligned, list) and not (job.workdir / "prepared").exists()
    again(job)
    again(job, looks_only=True)  # but takes what is there
    assert len(count) == 2
