"""Columns and the merged store: exact, resumable to the same bytes, and refused where they do not match."""

import dataclasses
import hashlib
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ctpd_jax.annotate.store import (
    MANIFEST,
    NAME,
    Column,
    _features,
    deserialized,
    from_record,
    open_store,
    serialized,
    shard_ranges,
    to_record,
    write_store,
)
from ctpd_jax.errors import UserError
from ctpd_jax.schema import SIDES, Aligned, AlignedPair, TokenSide

SCORERS = ("positive", "negative", "reference", "start")
FEW = {"spans": "character", "models": {"teacher": "abc", "student": "def"}, "lengths": (512, 128)}


def make_pair(index: int) -> AlignedPair:
    rng = np.random.default_rng(index)

    def side(spans: int) -> TokenSide:
        span_ids = np.sort(np.concatenate([np.arange(spans), rng.integers(0, max(spans, 1), spans)])).astype(np.int32)
        return TokenSide(rng.integers(0, 262_144, len(span_ids), np.int32), span_ids)

    def aligned(spans: int) -> Aligned:
        return Aligned(np.cumsum([0, *rng.integers(0, 9, spans)], dtype=np.int32), side(spans), side(spans))

    return AlignedPair(
        id=f"pär/{index} 🎈",
        teacher_prompt=rng.integers(0, 99, index % 4, np.int32),  # also an empty prompt
        student_prompt=rng.integers(0, 99, 3, np.int32),
        chosen=aligned(int(rng.integers(1, 6))),
        rejected=aligned(index % 3),  # also no span at all
        chosen_bytes=2**33 + index,
        rejected_bytes=index,
        truncated=(index % 2 == 0, index % 3 == 0),
        weight=1 + index / 8,
        margin=None if index % 3 == 0 else index - 2.5,
    )


def make_scores(index: int, scorers=SCORERS):
    rng, pair = np.random.default_rng(1000 + index), make_pair(index)
    return {
        side: {s: rng.normal(size=pair.response(number).num_spans).astype(np.float32) for s in scorers}
        for number, side in enumerate(SIDES)
    }


def records(shard, pairs):
    return (to_record(make_pair(i), make_scores(i)) for i in pairs)


def assert_equal(found, expected):
    """Dataclasses and dicts of arrays: dtype, shape and bytes."""
    if dataclasses.is_dataclass(expected):
        assert type(found) is type(expected)
        for field in dataclasses.fields(expected):
            assert_equal(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    else:
        assert found == expected and type(found) is type(expected)


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------- shards and columns


def test_shards_are_consecutive_and_cover_everything():
    assert shard_ranges(7, 3) == [range(3), range(3, 6), range(6, 7)]
    assert shard_ranges(6, 3) == [range(3), range(3, 6)]
    assert shard_ranges(0, 3) == []
    with pytest.raises(UserError, match="pairs_per_shard"):
        shard_ranges(5, 0)


RAGGED = [
    np.array([1.5, -0.0, np.nan], np.float32),
    np.zeros(0, np.float32),
    np.array([np.inf, 1e-42], np.float32),
    np.zeros(0, np.float32),
]


@pytest.mark.parametrize("arrays", [RAGGED, RAGGED[1:2], [], RAGGED[::-1]], ids=["ragged", "empty", "none", "reverse"])
def test_a_column_gives_back_what_was_written(tmp_path, arrays):
    column = Column(tmp_path, "positive", FEW)
    column.write(3, arrays)
    found = column.read(3)
    assert len(found) == len(arrays)
    for a, b in zip(found, arrays):
        assert_equal(a, b)
    assert column.missing_shards(5) == [0, 1, 2, 4]


def test_a_column_holds_float32_vectors_only(tmp_path):
    column = Column(tmp_path, "positive", FEW)
    for wrong in (np.zeros(3), np.zeros((2, 2), np.float32)):
        with pytest.raises(ValueError, match="float32"):
            column.write(0, [wrong])


def test_a_damaged_column_shard_is_missing(tmp_path):
    column = Column(tmp_path, "positive", FEW)
    column.write(0, RAGGED)
    path = tmp_path / "columns" / "positive" / "00000.f32"
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[:40], b"", b"nonsense", whole.replace(RAGGED[0].tobytes(), b"\1" * 12)):
        assert damaged != whole
        path.write_bytes(damaged)
        assert column.missing_shards(1) == [0]
        with pytest.raises(UserError, match=r"00000\.f32"):
            column.read(0)
    path.write_bytes(whole)
    assert column.missing_shards(1) == []


def test_every_flipped_byte_of_a_column_is_noticed(tmp_path):
    column = Column(tmp_path, "positive", FEW)
    column.write(0, RAGGED)
    path = tmp_path / "columns" / "positive" / "00000.f32"
    for at in range(path.stat().st_size):
        flip(path, at)
        assert column.missing_shards(1) == [0]
        flip(path, at)
    assert column.missing_shards(1) == []


def test_a_column_of_something_else_is_refused_by_field(tmp_path):
    Column(tmp_path, "positive", FEW)
    Column(tmp_path, "positive", FEW)
    Column(tmp_path, "negative", {**FEW, "models": {}})
    with pytest.raises(UserError, match=r"models\.student is 'def' there and 'xyz' here"):
        Column(tmp_path, "positive", {**FEW, "models": {"teacher": "abc", "student": "xyz"}})


# ---------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("index", range(6))
def test_a_record_is_a_pair_and_its_scores(index):
    pair, scores = from_record(to_record(make_pair(index), make_scores(index)))
    assert_equal(pair, make_pair(index))
    assert_equal(scores, make_scores(index))


def test_a_score_of_the_wrong_length_names_pair_and_scorer():
    scores = make_scores(4)
    scores["rejected"]["start"] = np.zeros(17, np.float32)
    with pytest.raises(ValueError, match=r"pär/4.*start of rejected.*17"):
        to_record(make_pair(4), scores)


# ---------------------------------------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, shard_ranges(11, 4), records, SCORERS, FEW)
    return folder


@pytest.fixture
def copy(written, tmp_path) -> Path:
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_store_gives_back_every_pair_in_order(written):
    store = open_store(written, FEW)
    assert len(store) == 11
    for index in range(11):
        pair, scores = store[index]
        assert_equal(pair, make_pair(index))
        assert_equal(scores, make_scores(index))
    assert store[-1][0].id == make_pair(10).id
    with pytest.raises(IndexError):
        store[11]
    assert [pair.id for pair, _ in store] == [make_pair(i).id for i in range(11)]
    assert pickle.loads(pickle.dumps(store))[3][0].id == make_pair(3).id
    assert store.manifest["num_pairs"] == 11 and store.manifest["scorers"] == list(SCORERS)


def test_tfds_opens_the_folder_without_tensorflow(written):
    code = f"""
import sys
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(written)!r})
source = builder.as_data_source(split="train")
assert builder.info.disable_shuffling and builder.name == {NAME!r}
assert "tensorflow" not in sys.modules
print(len(source), source[7]["id"].decode(), *source[7]["chosen_positive"].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    number, name, *values = done.stdout.replace("/7 ", "/7_").split()
    assert (number, name) == ("11", "pär/7_🎈"), done.stderr
    assert [float(v) for v in values] == make_scores(7)["chosen"]["positive"].tolist()


def test_records_are_those_of_tfds(written):
    """Byte for byte what its own serializer writes, and what its own data source reads."""
    import tensorflow_datasets as tfds

    features = _features(SCORERS)
    theirs = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    source = tfds.builder_from_directory(written).as_data_source("train")
    for index in range(11):
        record = to_record(make_pair(index), make_scores(index))
        data = serialized(record)
        assert data == theirs.get_tf_example(features.encode_example(record)).SerializeToString(deterministic=True)
        for read in (source[index], deserialized(data)):
            pair, scores = from_record(read)
            assert_equal(pair, make_pair(index))
            assert_equal(scores, make_scores(index))


def test_shards_of_nobody_knows_what_are_not_taken(tmp_path):
    column = Column(tmp_path, "positive", {"params": "abc"})
    column.write(0, [np.zeros(3, np.float32)])
    path = tmp_path / "columns" / "positive" / "identity.json"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=r"identity\.json is missing.*remove .*positive to measure it again"):
        Column(tmp_path, "positive", {"params": "abc"})
    path.write_bytes(whole.replace(b"abc", b"abd"))
    with pytest.raises(UserError, match=r"identity\.json is damaged.*remove .*positive to measure it again"):
        Column(tmp_path, "positive", {"params": "abc"})
    replaced = Column(tmp_path, "positive", {"params": "abc"}, replace=True)
    assert replaced.missing_shards(1) == [0]
    replaced._path(0).mkdir()
    assert replaced.missing_shards(1) == [0]


def test_a_store_in_an_older_form_is_written_anew(copy, written):
    older = {**json.loads((copy / MANIFEST).read_text()), "format": 2}
    del older["sha256"]  # which that version did not write
    (copy / MANIFEST).write_text(json.dumps(older))
    with pytest.raises(UserError, match="format is 2 there and 3 here"):
        open_store(copy)
    with pytest.raises(UserError, match="spans is 'character' there and 'byte' here"):
        write_store(copy, shard_ranges(11, 4), records, SCORERS, {**FEW, "spans": "byte"})
    for path in copy.glob("*array_record*"):
        path.write_bytes(b"another form")
    write_store(copy, shard_ranges(11, 4), records, SCORERS, FEW)
    assert content(copy) == content(written)


def test_the_names_of_the_scorers_are_free_but_for_those_of_the_pair(tmp_path):
    def ours(shard, pairs):
        return (to_record(make_pair(i), make_scores(i, ["student_positive"])) for i in pairs)

    write_store(tmp_path / "a", shard_ranges(2, 4), ours, ["student_positive"], FEW)
    assert_equal(open_store(tmp_path / "a")[1][1], make_scores(1, ["student_positive"]))
    with pytest.raises(UserError, match="student_ids"):
        write_store(tmp_path / "b", shard_ranges(2, 4), ours, ["student_ids"], FEW)


def test_a_wrong_number_of_records_in_a_shard_is_refused(tmp_path):
    with pytest.raises(ValueError, match="4 records, but 3 came"):
        write_store(tmp_path, [range(4)], lambda shard, pairs: list(records(shard, pairs))[:3], SCORERS, FEW)


def test_a_finished_store_is_not_made_again_and_another_one_is_refused(written):
    before = content(written)

    def never(shard, pairs):
        raise AssertionError("the store is finished")

    write_store(written, shard_ranges(11, 4), never, SCORERS, FEW)
    assert content(written) == before
    with pytest.raises(UserError, match="spans is 'character' there and 'byte' here"):
        write_store(written, shard_ranges(11, 4), never, SCORERS, {**FEW, "spans": "byte"})
    with pytest.raises(UserError, match="shard_pairs"):
        write_store(written, shard_ranges(11, 5), never, SCORERS, FEW)


def test_a_store_that_does_not_match_is_refused_by_field_with_both_values(written):
    with pytest.raises(UserError, match=r"models\.teacher is 'abc' there and 'zzz' here"):
        open_store(written, {"models": {"teacher": "zzz"}})
    with pytest.raises(UserError, match="precision is 'nothing' there and 'float32' here"):
        open_store(written, {"precision": "float32"})


def test_an_absent_and_an_unfinished_store_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no annotated store"):
        open_store(tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_store(tmp_path, shard_ranges(8, 4), lambda s, pairs: records(s, pairs) if s == 0 else 1 / 0, SCORERS, FEW)
    with pytest.raises(UserError, match="unfinished"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", [f"{NAME}-train.array_record-00001-of-00003", "features.json", "dataset_info.json"])
def test_a_flipped_byte_is_noticed_and_the_file_named(copy, name):
    flip(copy / name, (copy / name).stat().st_size // 2)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        open_store(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_store(copy, verify=False)


def test_verification_can_be_skipped(copy):
    name = f"{NAME}-train.array_record-00001-of-00003"
    flip(copy / name, (copy / name).stat().st_size // 2)  # in the padding or in a record: nobody looks
    assert len(open_store(copy, verify=False)) == 11


def test_a_damaged_store_is_made_again_to_the_same_bytes(copy, written):
    flip(copy / f"{NAME}-train.array_record-00001-of-00003", 70_000)
    (copy / MANIFEST).unlink()  # as the message says
    write_store(copy, shard_ranges(11, 4), records, SCORERS, FEW)
    assert content(copy) == content(written)


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_store import *
def dying(shard, pairs):
    for number, record in enumerate(records(shard, pairs)):
        if shard == int(sys.argv[3]) and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield record
write_store(sys.argv[1], shard_ranges(11, 4), dying, SCORERS, FEW)
"""


def test_a_killed_merge_goes_on_after_the_last_whole_shard_to_the_same_bytes(tmp_path, written):
    here = str(Path(__file__).parent)
    for shard in (1, 2):  # killed twice, the second time further on
        done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), here, str(shard)], timeout=120)
        assert done.returncode == -signal.SIGKILL
    asked = []

    def last(shard, pairs):
        asked.append(shard)
        return records(shard, pairs)

    write_store(tmp_path, shard_ranges(11, 4), last, SCORERS, FEW)
    assert asked == [2]
    assert content(tmp_path) == content(written)


def test_a_shard_damaged_before_the_end_is_made_again(tmp_path, written):
    def stops(shard, pairs):
        if shard == 2:
            raise KeyboardInterrupt
        return records(shard, pairs)

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, shard_ranges(11, 4), stops, SCORERS, FEW)
    flip(tmp_path / f"{NAME}-train.array_record-00000-of-00003", 70_000)
    write_store(tmp_path, shard_ranges(11, 4), records, SCORERS, FEW)
    assert content(tmp_path) == content(written)


def test_a_column_that_may_be_replaced_is(tmp_path):
    Column(tmp_path, "ctpd", FEW).write(0, [np.ones(2, np.float32)])
    assert Column(tmp_path, "ctpd", FEW, replace=True).missing_shards(1) == []
    assert Column(tmp_path, "ctpd", {**FEW, "spans": "byte"}, replace=True).missing_shards(1) == [0]


def test_a_manifest_cannot_take_the_stores_own_fields(tmp_path):
    with pytest.raises(ValueError, match="scorers"):
        write_store(tmp_path, shard_ranges(8, 4), records, SCORERS, {**FEW, "scorers": {"positive": "abc"}})


def test_a_process_that_does_not_judge_removes_nothing(tmp_path):
    """Over NFS it may still see what the first process has replaced."""
    Column(tmp_path, "ctpd", FEW).write(0, [np.ones(2, np.float32)])
    other = Column(tmp_path, "ctpd", {**FEW, "spans": "byte"}, replace=True, judge=False)
    assert other.missing_shards(1) == []
