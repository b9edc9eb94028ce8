"""The twin of a workdir: the bucket always holds the folder of some moment, whatever ends the process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctpd_jax.artifacts import canonical_json, write_bytes
from ctpd_jax.buckets import twin as twins
from ctpd_jax.buckets.objects import TOGETHER, Bucket, cache
from ctpd_jax.buckets.snapshot import listed
from ctpd_jax.buckets.twin import INDEX, Twin
from ctpd_jax.errors import UserError

URL = "gs://bucket/run"
NAMES = ("a", "b", "c/d", "c/e", "f")


def taken(url: str = URL) -> Twin:
    twin = Twin(url)
    twin._every = 1000.0  # rounds only where the test has them
    twin.take()
    return twin


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, text.encode())


def in_bucket(store) -> dict[str, str]:
    return {n.removeprefix("run/"): d.decode() for n, d in store.objects.items() if n != f"run/{INDEX}"}


def in_folder(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in listed(folder)}


def index_of(store) -> dict:
    return json.loads(store.objects[f"run/{INDEX}"])


def put_index(store, index: dict) -> None:
    index.pop("sha256", None)
    index["sha256"] = hashlib.sha256(canonical_json(index)).hexdigest()
    store.objects[f"run/{INDEX}"] = json.dumps(index).encode()


def another_machine() -> None:
    shutil.rmtree(cache("workdirs", URL))


def test_what_a_run_leaves_is_in_the_bucket_and_comes_back_on_another_machine(store):
    with twins.local(URL) as folder:
        write(folder, {"config.json": "{}", "train/params/0": "a", "lock": "me", "x.partial": "half"})
        (folder / "train" / "00000004.orbax-checkpoint-tmp").mkdir()
        write(folder, {"train/00000004.orbax-checkpoint-tmp/d": "half"})
    assert in_bucket(store) == {"config.json": "{}", "train/params/0": "a"} and index_of(store)["writer"] is None
    times = {name: stat.st_mtime_ns for name, stat in listed(folder).items()}
    another_machine()
    with twins.local(URL) as folder:
        assert in_folder(folder) == {"config.json": "{}", "train/params/0": "a"}
        assert {name: stat.st_mtime_ns for name, stat in listed(folder).items()} == times
        # Nothing new, nothing sent but the index.
        store.written.clear()
    assert set(store.written) == {f"run/{INDEX}"}


def test_what_is_removed_or_replaced_follows_and_a_log_grows(store):
    twin = taken()
    write(twin.folder, {"train/a": "1", "train/b": "2", "metrics.jsonl": "one\n"})
    twin._round()
    (twin.folder / "train" / "a").unlink()
    write(twin.folder, {"train/b": "3"})
    with open(twin.folder / "metrics.jsonl", "a") as log:
        log.write("two\n")
    store.written.clear()
    twin.close()
    assert in_bucket(store) == {"train/b": "3", "metrics.jsonl": "one\ntwo\n"}
    # What a reader could miss goes last: the index, after all that it names, and removals after that.
    assert store.written[-1] == f"run/{INDEX}" and "run/train/a" in store.removed


def test_what_an_index_names_is_not_written_over_before_the_next_one_is_there(store):
    twin = taken()
    write(twin.folder, {"manifest": "0 shards"})
    twin._round()
    store.written.clear()
    write(twin.folder, {"manifest": "1 shard", "shard": "data"})
    twin._round()
    sha256 = hashlib.sha256(b"1 shard").hexdigest()
    index, replaced = f"run/{INDEX}", f"run/ctpd-replaced/{sha256}"
    assert store.written[0] == index and set(store.written[1:3]) == {"run/shard", replaced}
    assert store.written[3:] == [index, "run/manifest", index] and store.removed == [replaced]
    twin.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    states=st.lists(st.dictionaries(st.sampled_from(NAMES), st.text("xyz")), min_size=1, max_size=4),
    kill=st.integers(0, 25),
    lost=st.booleans(),
)
def test_killed_at_any_write_the_next_one_goes_on_from_the_last_index_or_a_later_state(
    tmp_path, monkeypatch, states, kill, lost
):
    monkeypatch.setenv("CTPD_CACHE", str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    bucket = Bucket.open("memory://bucket/run")
    for name in bucket.names():
        bucket.remove(name)
    left = kill

    def struck(does: Callable) -> Callable:
        def work(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:  # from then on nothing is done
                raise UserError("killed")
            does(*arguments)

        return work

    # 1. The run goes from state to state; a round that was cut short is its last.
    with monkeypatch.context() as patch:
        twin, sent = taken("memory://bucket/run"), {}
        patch.setattr(Bucket, "put", struck(Bucket.put))
        patch.setattr(Bucket, "remove", struck(Bucket.remove))
        for state in ({**state, "config.json": "{}"} for state in states):  # which every run has
            before = in_folder(twin.folder)
            for name in before.keys() - state.keys():
                (twin.folder / name).unlink()
            write(twin.folder, {name: text for name, text in state.items() if before.get(name) != text})
            try:
                twin._round()
            except UserError:
                break
            sent = state
    twin._ended.set(), twin._thread.join()
    now = in_folder(twin.folder)
    # 2. Another command, here or where nothing is left.
    if lost:
        shutil.rmtree(tmp_path / "cache")
    again = taken("memory://bucket/run")
    found = in_folder(again.folder)
    if lost:
        assert found in (sent, now)  # the last index, or the one that was being sent
    else:
        # The twin was ahead of the bucket, and stays so; but one that lacks most of it is no newer state.
        assert found == now or (2 * len(sent.keys() - now.keys()) > len(sent) and found == sent)
    again.close()
    # Nothing is left behind.
    there = {name: bucket.fs.cat_file(bucket._at(name)).decode() for name in bucket.names() if name != INDEX}
    assert there == found


def test_a_store_that_is_away_for_a_while_costs_nothing(store, monkeypatch, capsys):
    monkeypatch.setenv("CTPD_BUCKET_SECONDS", "0.02")
    twin = Twin(URL)
    twin.take()
    store.fault = lambda method, name: 403 if method == "POST" else None
    write(twin.folder, {"a": "1"})
    while "It is tried again" not in capsys.readouterr().err:
        time.sleep(0.01)
    store.fault = lambda method, name: None
    twin.close()
    assert in_bucket(store) == {"a": "1"}


def test_a_store_that_stays_away_is_told_and_nothing_is_lost(store):
    twin = taken()
    write(twin.folder, {"a": "1"})
    store.fault = lambda method, name: 403 if method == "POST" else None
    with pytest.raises(UserError, match=f"{URL} is not up to date: .* All of it lies in {twin.folder}"):
        twin.close()
    store.fault = lambda method, name: None
    with twins.local(URL):
        pass
    assert in_bucket(store) == {"a": "1"}


def test_where_one_cannot_be_sent_the_others_are_not_tried_one_by_one(store):
    twin, asked = taken(), []
    write(twin.folder, {f"{number}": "x" for number in range(60)})
    store.fault = lambda method, name: 403 if method == "POST" and not asked.append(name) and len(asked) > 1 else None
    with pytest.raises(UserError, match="is not up to date"):
        twin.close()
    assert len(asked) <= 1 + 2 * TOGETHER
    store.fault = lambda method, name: None
    with twins.local(URL):
        pass
    assert len(in_bucket(store)) == 60


def test_what_ends_a_run_is_told_first(store, capsys):
    with pytest.raises(KeyError, match="the run's own"), twins.local(URL) as folder:
        write(folder, {"a": "1"})
        store.fault = lambda method, name: 403 if method == "POST" else None
        raise KeyError("the run's own")
    assert "is not up to date" in capsys.readouterr().err


def test_a_stage_that_somebody_removed_in_the_bucket_is_made_anew(store):
    with twins.local(URL) as folder:
        write(folder, {"config.json": "{}", "train/done.json": "{}", "train/params/0": "a"})
    for name in ("run/train/done.json", "run/train/params/0"):
        store.remove(name)
    with twins.local(URL) as folder:
        assert in_folder(folder) == {"config.json": "{}"}


def test_a_twin_that_was_emptied_is_filled_again(store):
    with twins.local(URL) as folder:
        write(folder, {"config.json": "{}", "train/done.json": "{}"})
    for path in folder.iterdir():  # as `rm -r FOLDER/*` does, which leaves the notes
        if not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with twins.local(URL) as folder:
        assert in_folder(folder) == {"config.json": "{}", "train/done.json": "{}"}
    assert in_bucket(store) == in_folder(folder)


def test_a_twin_that_is_removed_under_a_run_takes_nothing_with_it(store):
    twin = taken()
    write(twin.folder, {"config.json": "{}", "train/a": "1"})
    twin._round()
    shutil.rmtree(twin.folder)
    write(twin.folder, {"train/b": "2"})
    with pytest.raises(UserError, match="was removed while a run is at work in it"):
        twin.close()
    assert in_bucket(store) == {"config.json": "{}", "train/a": "1"}


def test_a_bucket_that_was_emptied_is_filled_again(store, capsys):
    with twins.local(URL) as folder:
        write(folder, {"config.json": "{}", "train/a": "1"})
    store.objects.clear()
    with twins.local(URL) as folder:
        pass
    assert in_bucket(store) == {"config.json": "{}", "train/a": "1"}
    assert f"{URL} is empty: {folder} is sent" in capsys.readouterr().out


def test_a_bucket_that_is_emptied_under_a_run_is_filled_again(store):
    twin = taken()
    write(twin.folder, {"config.json": "{}", "train/a": "1"})
    twin._round()
    store.objects.clear()
    twin.close()
    assert in_bucket(store) == {"config.json": "{}", "train/a": "1"}


def test_what_never_was_in_the_bucket_is_moved_aside(store, monkeypatch, capsys):
    with twins.local(URL) as folder:
        write(folder, {"config.json": "{}", "log": "1", "old": "1"})
    # Another machine goes on, without "old"; here there is something that was not sent.
    mine = os.environ["CTPD_CACHE"]
    monkeypatch.setenv("CTPD_CACHE", mine + "2")
    with twins.local(URL) as there:
        write(there, {"log": "2"})
        (there / "old").unlink()
    monkeypatch.setenv("CTPD_CACHE", mine)
    write(folder, {"train/ckpt": "mine"})
    with twins.local(URL) as folder:
        assert in_folder(folder) == {"config.json": "{}", "log": "2"}
    assert "but not there, lies in" in capsys.readouterr().err
    (aside,) = (folder.parent / "aside").iterdir()
    assert in_folder(aside) == {"train/ckpt": "mine"}


def test_an_object_that_is_not_as_it_was_sent_is_named(store):
    with twins.local(URL) as folder:
        write(folder, {"config.json": "{}"})
    store.objects["run/config.json"] = b"[]"
    another_machine()
    with pytest.raises(UserError, match=f"{URL}/config.json is not what its index says"):
        taken()


def test_a_look_where_a_stage_was_removed(store):
    with twins.local(URL) as folder:
        write(folder, {"config.json": "{}", "train/done.json": "{}"})
    another_machine()
    store.remove("run/train/done.json")
    with twins.local(URL, looks_only=True) as seen:
        assert in_folder(seen) == {"config.json": "{}"}


def test_a_folder_that_is_a_link_is_refused(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="is a link to a folder"), twins.local(URL) as folder:
        (folder / "train").symlink_to(tmp_path / "elsewhere")


def test_of_two_that_waited_for_the_same_dead_one_one_writes(store, monkeypatch):
    with twins.local(URL) as folder:
        write(folder, {"a": "1"})
    elsewhere(store, seconds_ago=twins.HOUR + 1)
    names = Bucket.names

    def slowly(bucket: Bucket) -> dict[str, Any]:  # meanwhile another one is faster
        elsewhere(store, seconds_ago=0.0, writer="y")
        return names(bucket)

    monkeypatch.setattr(Bucket, "names", slowly)
    with pytest.raises(UserError, match="process 7 on far writes there now"):
        taken()
    assert index_of(store)["writer"]["id"] == "y"


def test_objects_that_are_listed_late_are_not_taken_for_removed(store):
    store.late = 1000.0
    with twins.local(URL) as folder:
        write(folder, {"a": "1"})
    another_machine()
    with twins.local(URL) as folder:
        assert in_folder(folder) == {"a": "1"}


def test_a_bucket_that_holds_something_else_is_refused(store):
    store.objects["run/holiday.jpg"] = b"x"
    with pytest.raises(UserError, match=f"{URL} holds files, but no run"):
        taken()
    assert list(store.objects) == ["run/holiday.jpg"]


def test_a_bucket_that_does_not_answer_is_not_taken_for_a_damaged_one(store):
    store.fault = lambda method, name: 403
    with pytest.raises(UserError, match=f"{URL} cannot be read"), twins.local(URL):
        pass


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"nonsense", b'{"files": {}, "gone": [], "writer": null}'])
@pytest.mark.parametrize("looks_only", [False, True])
def test_an_index_that_is_not_as_it_was_written_is_refused(store, data, looks_only):
    store.objects[f"run/{INDEX}"] = data
    with pytest.raises(UserError, match=f"{URL}/{INDEX} is damaged"), twins.local(URL, looks_only):
        pass
    assert store.objects == {f"run/{INDEX}": data}


def test_an_index_that_names_what_lies_elsewhere_is_refused(store):
    with twins.local(URL) as folder:
        write(folder, {"a": "1"})
    index = index_of(store)
    index["files"]["../../evil"] = index["files"]["a"]
    put_index(store, index)
    another_machine()
    with pytest.raises(UserError, match="lies outside of it"):
        taken()


# ------------------------------------------------------------------------------------------------ others


def elsewhere(store, seconds_ago: float, writer: str = "x") -> None:
    """As if the bucket's writer were on another machine, and was heard of so long ago."""
    index = index_of(store)
    index["writer"] = {
        "id": writer,
        "process": 7,
        "host": "far",
        "machine": "far",
        "folder": "/far",
        "heard": time.time() - seconds_ago,
    }
    put_index(store, index)


def test_one_of_this_machine_that_is_alive_is_refused_at_once_and_one_that_died_is_not(store):
    taken()._ended.set()
    for process in (os.getppid(), 2**22 + 1):  # the last is more than there can be
        index = index_of(store)
        index["writer"]["process"] = process
        put_index(store, index)
        if process == os.getppid():
            with pytest.raises(UserError, match=f"Another command is at work in {URL}, process {process} on "):
                taken()
        else:
            taken().close()


def test_one_of_another_machine_is_waited_for_until_it_is_silent_for_long(store, monkeypatch, capsys):
    with twins.local(URL) as folder:
        write(folder, {"a": "1"})
    elsewhere(store, seconds_ago=twins.HOUR + 1)
    taken().close()  # it has been silent for long
    capsys.readouterr()
    monkeypatch.setattr(twins, "SILENT", 0.4)
    elsewhere(store, seconds_ago=0.0)
    taken().close()
    assert f"{URL}: process 7 on far may be at work; waiting 0 s" in capsys.readouterr().out


def test_one_of_another_machine_that_is_heard_of_is_refused(store, monkeypatch):
    with twins.local(URL):
        pass
    elsewhere(store, seconds_ago=0.0)
    monkeypatch.setattr(twins.Twin, "_index", heard_of_again(twins.Twin._index, store))
    with pytest.raises(UserError, match=f"Another command is at work in {URL}, process 7 on far"):
        taken()


def heard_of_again(read, store):
    """The index as it is read, and a word of its writer before each reading."""

    def index(self):
        elsewhere(store, seconds_ago=0.0)
        return read(self)

    return index


def test_who_was_taken_for_dead_and_was_not_stops(store, monkeypatch):
    sent = []
    monkeypatch.setattr(twins.os, "kill", lambda process, number: sent.append(number))
    monkeypatch.setenv("CTPD_BUCKET_SECONDS", "0.05")
    twin = Twin(URL)
    twin.take()
    elsewhere(store, seconds_ago=0.0)
    twin._thread.join(20)
    assert sent == [15] and index_of(store)["files"] == {}
    with pytest.raises(
        UserError, match=f"belongs to another command now; what this one has made lies in {twin.folder}"
    ):
        twin.close()


def test_who_looks_sees_the_newest_and_sends_nothing(store):
    with pytest.raises(UserError, match=f"{URL} holds no run"), twins.local(URL, looks_only=True):
        pass
    twin = taken()
    write(twin.folder, {"config.json": "{}", "big": "x" * 100})
    # On this machine that is the twin itself, also before it is sent.
    with twins.local(URL, looks_only=True) as seen:
        assert seen == twin.folder
    twin.close()
    another_machine()
    store.written.clear()
    elsewhere(store, seconds_ago=3.0)
    with pytest.MonkeyPatch.context() as patch, twins.local(URL, looks_only=True, small=True) as _:
        patch.setattr(twins, "SMALL", 50)
        with twins.local(URL, looks_only=True, small=True) as seen:
            assert in_folder(seen) == {"config.json": "{}"} and seen != twin.folder
            assert json.loads((seen / twins.WRITER).read_text())["host"] == "far"
    with twins.local(URL, looks_only=True) as seen:
        assert in_folder(seen) == {"config.json": "{}", "big": "x" * 100}
    assert store.written == []


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "500"])
def test_seconds_that_are_none(store, monkeypatch, given):
    monkeypatch.setenv("CTPD_BUCKET_SECONDS", given)
    with pytest.raises(UserError, match=f"CTPD_BUCKET_SECONDS={given} in the environment"):
        Twin(URL)


def test_one_process_only(store, monkeypatch):
    monkeypatch.setattr(twins, "several", lambda: True)
    with pytest.raises(UserError, match="several need a folder that all of them see"), twins.local(URL):
        pass


def test_a_local_workdir_is_itself(tmp_path):
    with twins.local(tmp_path / "run") as folder:
        assert folder == tmp_path / "run" and not folder.exists()
