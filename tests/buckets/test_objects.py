"""Models and data in a bucket: fetched once, anew where they have changed, and nothing outside of their folder."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from toy import world_on_disk

from ctpd_jax.artifacts import is_url
from ctpd_jax.buckets import objects
from ctpd_jax.buckets.objects import Bucket, at_hand, fetched
from ctpd_jax.cli import main
from ctpd_jax.errors import UserError
from ctpd_jax.models.hf import load_hf

ROW = {"prompt": "Hello?", "chosen": "Hello, you.", "rejected": "Go away."}


def anew(path: str, weights: bool = True) -> Path:
    """As the next command does it."""
    objects.fetched.cache_clear()
    return fetched(path, weights)


def test_what_is_a_url():
    assert all(map(is_url, ("gs://bucket/run", "s3://b", "hf://datasets/a/b", "GS://bucket")))
    assert not any(map(is_url, ("runs/demo", "/a:b", "hf:owner/name", "tfds:name", "http://host/v1", Path("gs://b/x"))))


def test_a_file_and_a_folder_are_fetched_and_fetched_anew_where_they_changed(store):
    store.objects |= {"data/train.jsonl": b"one", "data/deep/test.jsonl": b"two", "data/pytorch_model.bin": b"pickle"}
    assert anew("gs://bucket/data/train.jsonl").read_bytes() == b"one"
    folder = anew("gs://bucket/data/")
    assert folder.name == "data" and (folder / "deep" / "test.jsonl").read_bytes() == b"two"
    assert not (folder / "pytorch_model.bin").exists()  # nothing here reads a pickle
    # Asked again, the store is only listed.
    store.read.clear()
    assert anew("gs://bucket/data/") == folder and store.read == []
    # What changed is fetched, what went is gone.
    store.put("data/train.jsonl", b"1")
    store.remove("data/deep/test.jsonl")
    assert anew("gs://bucket/data/") == folder and store.read == ["data/train.jsonl"]
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["train.jsonl"]
    # A copy that somebody damaged is another matter: what is missing comes again.
    (folder / "train.jsonl").unlink()
    assert (anew("gs://bucket/data/") / "train.jsonl").read_bytes() == b"1"


def test_a_tokenizer_needs_no_weights_and_weights_that_are_there_stay(store):
    store.objects |= {"m/config.json": b"{}", "m/model.safetensors": b"weights"}
    folder = anew("gs://bucket/m", weights=False)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert (anew("gs://bucket/m") / "model.safetensors").read_bytes() == b"weights"
    store.read.clear()
    anew("gs://bucket/m", weights=False), anew("gs://bucket/m")
    assert (folder / "model.safetensors").exists() and store.read == []


def test_a_large_object_goes_both_ways_in_pieces(store, tmp_path):
    data = bytes(range(256)) * (12 << 12)  # 12 MB; gcsfs sends more than five in pieces
    (tmp_path / "large").write_bytes(data)
    bucket, counted = Bucket.open("gs://bucket/run"), []
    bucket.put("large", tmp_path / "large")
    bucket.get("large", tmp_path / "back", counted.append)
    assert (tmp_path / "back").read_bytes() == data and sum(counted) == len(data)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_store_that_fails_now_and_then_is_asked_again(store, tmp_path, status):
    store.objects["data/train.jsonl"] = b"one"
    answers = iter([status] * 2)
    store.fault = lambda method, name: next(answers, None)
    assert anew("gs://bucket/data/train.jsonl").read_bytes() == b"one"


def test_what_cannot_be_had_is_a_sentence(store, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="There is nothing at gs://bucket/none"):
        anew("gs://bucket/none")
    with pytest.raises(UserError, match="Protocol not known: nosuch"):
        anew("nosuch://bucket/none")
    with pytest.raises(FileNotFoundError):
        Bucket.open("gs://bucket/run").get("none", tmp_path / "none")
    store.objects["data/train.jsonl"] = b"one"
    store.fault = lambda method, name: 403
    with pytest.raises(UserError, match=r"gs://bucket/data/train\.jsonl cannot be listed"):
        anew("gs://bucket/data/train.jsonl")


def test_folders_of_a_console_and_buckets_that_are_not_there(store):
    store.objects |= {"d/": b"", "d/sub/": b"", "d/sub/train.jsonl": b"one"}
    assert (anew("gs://bucket/d/") / "sub" / "train.jsonl").read_bytes() == b"one"
    store.fault = lambda method, name: 404
    with pytest.raises(UserError, match="There is nothing at gs://nobucket/x"):
        anew("gs://nobucket/x")
    with pytest.raises(UserError, match="gs:// names no bucket"):
        Bucket.open("gs://")


def test_an_error_is_no_answer_to_whether_an_object_is_there(store):
    store.objects["run/a"] = b"1"
    bucket = Bucket.open("gs://bucket/run")
    assert bucket.has("a") and not bucket.has("b")
    store.fault = lambda method, name: 403
    with pytest.raises(UserError, match="cannot be read"):
        bucket.has("a")


def test_a_copy_has_its_own_names_and_a_long_address_a_short_one(store):
    store.objects |= {"fetched.json": b"one", "lock": b"two"}
    for name in ("fetched.json", "lock"):
        assert anew(f"gs://bucket/{name}").read_bytes() == store.objects[name]
        assert anew(f"gs://bucket/{name}").read_bytes() == store.objects[name]
    long = [objects.cache("inputs", f"gs://bucket/{'模型' * 20}/{number}") for number in range(2)]
    assert long[0] != long[1] and all(len(path.name) <= 200 for path in long)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd"])
def test_a_name_that_leads_out_of_its_folder_is_refused(name):
    with pytest.raises(UserError, match="lies outside of it"):
        objects.check_inside("gs://bucket/run", name)


def test_models_tokenizers_and_data_are_named_as_local_ones_are(store, tmp_path, capsys):
    world = world_on_disk()
    for name, folder in (("teacher", world.teacher), ("student", world.student)):
        for file in Path(folder).iterdir():
            store.objects[f"{name}/{file.name}"] = file.read_bytes()
    store.objects["pairs.jsonl"] = (json.dumps(ROW) + "\n").encode() * 4
    # 1. A model's parameters, by the functional interface.
    config, params = load_hf("gs://bucket/student")
    local, _ = load_hf(world.student)
    assert config == local and params
    # 2. Rows, by two tokenizers, with the command that looks at data.
    models = ["--teacher", "gs://bucket/teacher", "--student", "gs://bucket/student"]
    assert main(["inspect", "--data", "gs://bucket/pairs.jsonl", *models, "--stats"]) == 0
    assert "4 rows" in capsys.readouterr().out.replace("  ", " ")
    # 3. An answer from a model folder.
    assert main(["generate", "--folder", "gs://bucket/student", "--prompt", "Hello?", "--max-new-tokens", "2"]) == 0


def test_no_name_or_password_of_an_address_is_in_the_name_of_its_copy():
    assert "secret" not in str(objects.cache("inputs", "ftp://me:secret@host/data"))


def test_a_local_path_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_hand("~/x") == tmp_path / "x" and at_hand(Path("a/b")) == Path("a/b")


@pytest.mark.parametrize("option", ["--out", "--log"])
def test_what_a_command_writes_by_name_is_a_local_file(option, capsys):
    command = {"--out": "table", "--log": "run"}[option]
    with pytest.raises(SystemExit) as ended:
        main([command, "--config", "c.py", "--workdir", "w", option, "gs://bucket/file"])
    assert ended.value.code == 2 and "gs://bucket/file lies in a bucket" in capsys.readouterr().err


def test_processes_of_one_machine_fetch_one_after_the_other(store, tmp_path):
    store.objects["data/train.jsonl"] = b"one"
    place = objects.cache("inputs", "gs://bucket/data")
    with objects.locked(place):
        thread = threading.Thread(target=anew, args=("gs://bucket/data",))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not (place / "copy").exists()
    thread.join(10)
    assert (place / "copy" / "data" / "train.jsonl").read_bytes() == b"one"
    shutil.rmtree(place)
