"""What is whole, and made from the same, is taken; everything else is refused, or made anew, by name."""

import json
import os
from pathlib import Path

import pytest

from ctpd_jax.artifacts import (
    Broken,
    begin,
    check_files,
    checksums,
    finish,
    first_difference,
    kept,
    opened,
    read_json,
    read_record,
    replacing_folder,
    seal,
    unseal,
    write_bytes,
    write_json,
    write_record,
)
from ctpd_jax.errors import UserError

FEW = {"spans": "character", "models": {"teacher": "abc", "student": "def"}, "lengths": (512, 128)}


def test_the_first_difference_is_the_first_in_the_order_of_what_is_expected():
    assert first_difference(FEW, json.loads(json.dumps(FEW))) is None
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == ("a.b", 1, "nothing")
    assert first_difference({"a": 1, "b": 2}, {"b": 3, "a": 1, "c": 0}) == ("b", 2, 3)
    assert first_difference({"a": True}, {"a": 1}) == ("a", True, 1)
    assert first_difference({"a": {"b": 1}}, {"a": 5}) == ("a.b", 1, "nothing")
    assert first_difference({"a": 1.0}, {"a": 1}) is None


def test_a_field_that_is_not_expected_differs_where_all_are_compared():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, exactly=True) == ("a.c", "nothing", 2)
    assert first_difference({"a": {}}, {"a": {}, "z": 0}, exactly=True) == ("z", "nothing", 0)
    assert first_difference({"a": {"b": (1,)}}, {"a": {"b": [1]}}, exactly=True) is None


def test_what_was_made_otherwise_is_refused_or_taken_for_absent(tmp_path):
    path = tmp_path / "seal.json"
    assert opened(path, FEW, "Go away.") is None and kept(path, FEW) is None
    write_json(path, {**FEW, "result": 7})
    assert opened(path, FEW, "Go away.")["result"] == kept(path, FEW)["result"] == 7
    other = {**FEW, "models": {"teacher": "abc", "student": "xyz"}}
    with pytest.raises(UserError, match=r"seal\.json.*models\.student is 'def' there and 'xyz' here\. Go away\."):
        opened(path, other, "Go away.")
    assert kept(path, other) is None
    assert kept(path, {**FEW, "models": {"teacher": "abc"}}) is None  # made from more than that
    path.write_text("{")
    with pytest.raises(Broken, match=r"seal\.json is damaged"):
        opened(path, FEW, "Go away.")


@pytest.fixture
def sealed(tmp_path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"b" * 100)
    (tmp_path / "a").write_bytes(b"a")
    seal(tmp_path / "seal.json", {"made_from": FEW})
    return tmp_path / "seal.json"


def test_a_seal_vouches_for_every_file_and_for_itself(sealed):
    found = unseal(sealed)
    assert found["made_from"] == json.loads(json.dumps(FEW)) and set(found["files"]) == {"a", "deep/b"}
    files = [path for path in sealed.parent.rglob("*") if path.is_file()]
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(Broken, match=f"{path.name} is damaged"):
                unseal(sealed)
        path.unlink()
        with pytest.raises(Broken, match=f"{path.name} is missing"):
            unseal(sealed)
        path.write_bytes(whole)
    assert unseal(sealed) == found


def test_files_are_read_only_where_that_is_asked_for(sealed):
    sums = checksums(sealed.parent, ["a", "deep/b"])
    (sealed.parent / "a").write_bytes(b"x")
    unseal(sealed, read=False)
    check_files(sealed.parent, sums, read=False)
    with pytest.raises(Broken, match="a is damaged"):
        check_files(sealed.parent, sums)
    (sealed.parent / "a").unlink()
    with pytest.raises(Broken, match="a is missing"):
        check_files(sealed.parent, sums, read=False)


def test_a_seal_of_another_version_is_whole_but_not_read(tmp_path):
    seal(tmp_path / "seal.json", {"format": 99})
    with pytest.raises(UserError, match="format 99") as error:
        unseal(tmp_path / "seal.json")
    assert not isinstance(error.value, Broken)


def test_a_folder_takes_its_place_with_what_others_laid_there(tmp_path):
    def ours(name: str) -> bool:
        return name.startswith("model")

    place = tmp_path / "m"
    for number in (1, 2):
        with replacing_folder(place, "model.json", "a model folder", ours) as beside:
            write_json(beside / "model.json", number)
        if number == 1:
            (place / "model.old").write_text("goes")
            (place / "notes.txt").write_text("mine")
            (place / "sub").mkdir()
            (place / "sub" / "model.txt").write_text("mine too")
            os.symlink("nowhere", place / "link")
    assert read_json(place / "model.json") == 2
    assert sorted(path.name for path in place.iterdir()) == ["link", "model.json", "notes.txt", "sub"]
    assert (place / "sub" / "model.txt").read_text() == "mine too" and os.readlink(place / "link") == "nowhere"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused = pytest.raises(UserError, match="is not a model folder")
    with refused, replacing_folder(tmp_path / "other", "model.json", "a model folder", ours):
        pass


# ------------------------------------------------------------------------------------------------ records


def test_a_record_is_what_was_written_or_broken(tmp_path):
    path, value = tmp_path / "record.json", {"loss": 0.25, 3: (1, 2), "text": "é \ud800 \\ud800", "none": None}
    write_record(path, value)
    expected = {"loss": 0.25, "3": [1, 2], "text": "é \ud800 \\ud800", "none": None}
    assert read_record(path) == expected and read_record(tmp_path / "none.json") is None
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = read_record(path, "do that")
        except Broken as error:
            assert str(path) in str(error) and str(error).endswith("; do that.")
        else:  # white space, or the name of the checksum, which then is one field more
            assert found.items() >= expected.items()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '"x"', "null", "3", "{", '{"a": NaN, "sha256": ""}', "[" * 10**5, '{"a":' * 10**5, "\x00"]
)
def test_what_is_no_record_is_broken(tmp_path, text):
    if text != "null":  # as if there were none
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(Broken, match=r"record\.json is damaged .*; remove it, and the command"):
            read_record(tmp_path / "record.json")
    (tmp_path / "seal.json").write_text(text)
    with pytest.raises(Broken, match=r"seal\.json is damaged"):
        unseal(tmp_path / "seal.json")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "seal.json").mkdir()
    with pytest.raises(Broken, match=r"seal\.json is damaged"):
        unseal(tmp_path / "seal.json")
    with pytest.raises(Broken, match=r"seal\.json cannot be read .*; remove it"):
        read_record(tmp_path / "seal.json")


def test_an_object_of_an_earlier_version_has_no_checksum(tmp_path):
    write_json(tmp_path / "done.json", {"params": "abc"})
    assert read_record(tmp_path / "done.json") == {"params": "abc"}


def test_a_damaged_seal_is_as_good_as_none_where_it_can_be_made_anew(tmp_path):
    write_record(tmp_path / "seal.json", FEW)
    assert kept(tmp_path / "seal.json", FEW) is not None
    (tmp_path / "seal.json").write_text("{")
    assert kept(tmp_path / "seal.json", FEW) is None


def test_a_stage_whose_inputs_are_lost_is_not_taken_for_finished(tmp_path):
    begin(tmp_path / "sft", FEW)
    finish(tmp_path / "sft", {"params": "abc"})
    assert begin(tmp_path / "sft", FEW) == {"params": "abc"}
    (tmp_path / "sft" / "inputs.json").unlink()
    with pytest.raises(Broken, match=r"inputs\.json is missing.*remove .*sft to make the stage again"):
        begin(tmp_path / "sft", FEW)


@pytest.mark.parametrize("name", ["../outside", "deep/../../outside", "/etc/hostname"])
def test_a_seal_does_not_lead_out_of_its_folder(tmp_path, name):
    (tmp_path / "outside").write_text("x")
    (tmp_path / "store").mkdir()
    with pytest.raises(Broken, match="lies outside"):
        check_files(tmp_path / "store", {name: "0" * 64})


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no file, and nothing else is replaced"):
        write_bytes(tmp_path / "pipe", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
