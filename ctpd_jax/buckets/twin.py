"""A workdir in a bucket: the run works in a local twin of it, and what it writes is sent after it.

A run that is killed at any moment leaves a folder from which it goes on. So a bucket that always holds the folder of
some moment is enough, and no stage needs to know of it. Every half a minute what is new in the twin is kept aside, as
it was at one moment, and sent; then one object, the index, names all that belongs together. An index is the old one or
the new one: nothing is renamed, and nothing that it names is removed before the next one is written.

    URL/STAGE/...             as in a local workdir
    URL/ctpd-index.json       {"files": {name: {"size", "sha256", "time"}}, "gone": [name], "writer": {...} or null};
                              "gone" is what it does not name, and may still be there, or on its way

Who writes says in the index when it was last heard; another one waits until it has been silent for long.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import platform
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ctpd_jax.artifacts import is_url, read_record, sha256_file, unchanged, write_record
from ctpd_jax.buckets.objects import SMALL, TOGETHER, Bucket, cache, check_inside, fetch
from ctpd_jax.errors import UserError, without_secrets
from ctpd_jax.processes import messages
from ctpd_jax.processes.together import several

INDEX = "ctpd-index.json"
WRITER = ".index-writer.json"  # in a copy that is only looked at: who has its original
EVERY = 30.0  # seconds from one look at the twin to the next; CTPD_BUCKET_SECONDS
LONGEST = 60.0  # that it may be
SILENT = 120.0  # seconds after which a writer counts as dead
# Files of one process, half-written ones, and what changes whenever it is read.
_UNSENT = ("lock", ".index*", "*.partial", "*.old", "*.orbax-checkpoint-tmp*", "*-atime")

Index = dict[str, Any]


@contextlib.contextmanager
def local(workdir: str | Path, looks_only: bool = False, small: bool = False) -> Iterator[Path]:
    """Give the folder of a workdir: itself, or the twin of one in a bucket, which is up to date after the block.

    With `looks_only` nothing is sent; with `small` only files are fetched that are read at a glance.

    Raises:
      UserError: another command is at work in it, it cannot be reached, or there are several processes.
    """
    if not is_url(workdir):
        yield Path(workdir)
        return
    if several():
        raise UserError(
            f"{workdir} can be the workdir of one process; several need a folder that all of them see (docs/launch.md)."
        )
    twin = Twin(str(workdir))
    if looks_only:
        yield twin.seen(small)
        return
    twin.take()
    try:
        yield twin.folder
    except BaseException:
        try:
            twin.close()
        except UserError as error:  # what ended the block says more
            messages.fail(str(error))
        raise
    twin.close()


def every() -> float:
    """Return the seconds from one look at the twin to the next."""
    given = os.environ.get("CTPD_BUCKET_SECONDS") or EVERY
    with contextlib.suppress(ValueError):
        if 0 < float(given) <= LONGEST:
            return float(given)
    raise UserError(f"CTPD_BUCKET_SECONDS={given} in the environment: seconds, more than 0, at most {LONGEST:g}.")


class _TakenOver(UserError):
    """Another command writes into the bucket."""


class Twin:
    """The twin of a workdir in a bucket: `take` it, work in `folder`, `close` it."""

    def __init__(self, url: str) -> None:
        self.bucket = Bucket.open(url)
        self.url, self._place = without_secrets(self.bucket.url), cache("workdirs", self.bucket.url)
        self.folder = self._place / "workdir"
        self._files: dict[str, dict[str, Any]] = {}  # what the index names
        self._gone: list[str] = []  # what it does not name, and may be there
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of each file as it was sent
        self._me = {"id": uuid.uuid4().hex, "process": os.getpid(), "host": platform.node(), "machine": _machine()}
        self._ours = {self._me["id"]}  # this writer, and the dead one that it comes after
        self._lost = False
        self._every = every()
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._follow, daemon=True)

    def take(self) -> None:
        """Become the one who writes: the twin gets what is new in the bucket, the bucket what is new in the twin."""
        # 1. Nobody else writes, and what is there is a run.
        self.folder.mkdir(parents=True, exist_ok=True)
        index, listed = self._wait_for_writer(), self.bucket.names()
        if not index and listed:
            raise UserError(f"{self.url} holds files, but no run: there is no {INDEX}. Take another --workdir.")
        # 2. What somebody has removed there is removed here: it is how a stage is made anew.
        files = index.get("files", {})
        for name in [name for name in files if name not in listed and not self.bucket.has(name)]:
            del files[name]
            (self.folder / name).unlink(missing_ok=True)
        # 3. A twin that goes back to this very index may be ahead of it; any other one is behind.
        if not self._descends_from(index):
            _fetch(self.bucket, files, self.folder)
            for name in _listed(self.folder).keys() - files.keys():
                (self.folder / name).unlink()
        self._files, self._gone = files, index.get("gone", [])
        self._ours |= {index["writer"]["id"]} if index.get("writer") else set()
        self._sent = {name: (entry["size"], entry["time"]) for name, entry in files.items()}
        # 4. From here on the bucket says who writes.
        self._round()
        messages.say(f"{self.url}: works in {self.folder}, and sends what is new every {self._every:g} s.")
        self._thread.start()

    def seen(self, small: bool) -> Path:
        """Return a folder to look at: the twin where it is the newest, else a copy beside it."""
        index = self._index()
        if not index:
            raise UserError(f"{self.url} holds no run: there is no {INDEX}.")
        writer = index["writer"]
        if self._descends_from(index) or (writer and writer["machine"] == _machine() and not _dead(writer)):
            return self.folder
        copy = self._place / "looked"
        copy.mkdir(parents=True, exist_ok=True)
        for last in (False, False, True):
            files = {name: entry for name, entry in index["files"].items() if not small or entry["size"] < SMALL}
            try:
                _fetch(self.bucket, files, copy)
                break
            except FileNotFoundError:  # the run goes on, and has removed it
                if last:
                    raise
                index = self._index()
        for name in _listed(copy).keys() - files.keys():
            (copy / name).unlink()
        write_record(copy / WRITER, writer or {"heard": None})
        return copy

    def close(self) -> None:
        """Send what is left, and let others write.

        Raises:
          UserError: it could not be sent, or another command has taken over.
        """
        self._ended.set()
        self._thread.join()
        if self._lost:
            raise UserError(f"{self.url} belongs to another command now; what this one has made lies in {self.folder}.")
        try:
            self._round(leaving=True)
        except Exception as error:
            raise UserError(
                f"{self.url} is not up to date: {error} All of it lies in {self.folder}, and the same command sends it."
            ) from error
        messages.say(f"{self.url}: up to date.")

    # ------------------------------------------------------------------------------------------------ the index

    def _index(self) -> Index:
        """Return what the index holds, {} where there is none."""
        file = self._place / f"{self._me['id']}.json"  # others of this machine may look meanwhile
        try:
            self.bucket.get(INDEX, file)
            index = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            index = None
        finally:
            file.unlink(missing_ok=True)
        if not isinstance(index, dict) or "sha256" not in index or not unchanged(index):
            raise UserError(f"{self.url}/{INDEX} is damaged; take another --workdir, or remove all of {self.url}.")
        for name in [*index["files"], *index["gone"]]:
            check_inside(self.url, name)
        return index

    def _hold(self, leaving: bool = False) -> None:
        """Write the index, with the word that this one was heard of, unless another command has taken over."""
        # Whoever waited for this one to fall silent, or for the same one, may write by now.
        other = self._index().get("writer")
        if other and other["id"] not in self._ours:
            self._lost = True
            raise _TakenOver(f"{self.url}: process {other['process']} on {other['host']} writes there now.")
        self._ours = {self._me["id"]}
        # A kill may come before the store has answered: the twin goes back to either index.
        writer = None if leaving else {**self._me, "heard": time.time()}
        index = {"files": self._files, "gone": self._gone, "writer": writer}
        following = self.folder / ".index-next.json"
        write_record(following, index)
        self.bucket.put(INDEX, following)
        os.replace(following, self.folder / ".index.json")

    def _descends_from(self, index: Index) -> bool:
        """Whether the twin was in the state of this index, so that whatever differs is newer than it."""
        # One that was emptied, but for its notes, is no newer state.
        files = index.get("files", {})
        emptied = bool(files) and not any((self.folder / name).exists() for name in files)
        notes = (self.folder / ".index.json", self.folder / ".index-next.json")
        return bool(index) and not emptied and any(read_record(note) == index for note in notes)

    def _wait_for_writer(self) -> Index:
        """Return the index once nobody else writes."""
        index = self._index()
        if not (first := index.get("writer")) or _dead(first):
            return index
        # The clocks of two machines may differ, but not by hours.
        who, began = f"process {first['process']} on {first['host']}", time.monotonic()
        silence = min(SILENT, max(0.0, SILENT - (time.time() - first["heard"])))
        here = first["machine"] == _machine()
        if silence and not here:
            messages.say(f"{self.url}: {who} may be at work; waiting {silence:.0f} s whether it is heard of.")
        while not here and time.monotonic() - began < silence and index.get("writer") == first:
            time.sleep(min(1.0, silence))
            index = self._index()
        if here or index.get("writer") not in (None, first):
            raise UserError(
                f"Another command is at work in {self.url}, {who}: two would spoil each other's files. Wait for it, "
                "stop it, or give another --workdir."
            )
        return index

    # ------------------------------------------------------------------------------------------------ sending

    def _follow(self) -> None:
        while not self._ended.wait(self._every):
            try:
                self._round()
            except _TakenOver as error:
                messages.fail(str(error))
                os.kill(os.getpid(), signal.SIGTERM)
                return
            except Exception as error:  # the run goes on; what was not sent now is sent later
                messages.say(f"{self.url}: {error} It is tried again.", logging.WARNING)

    def _round(self, leaving: bool = False) -> None:
        """Bring the bucket to the state of the twin."""
        # 1. The twin as it is now. None: it was written to all the time.
        kept_aside = self._place / "outgoing"
        now = self._kept_aside(kept_aside)
        if now is None:
            return self._hold()
        # 2. What no index names yet may be left behind by a kill: it is noted, and then sent first.
        changed = [name for name, seen in now.items() if self._sent.get(name) != seen]
        new = [name for name in changed if name not in self._files]
        if new:
            self._gone = sorted({*self._gone, *new})
            self._hold()
        for wave in (new, [name for name in changed if name in self._files]):
            self._send(wave, kept_aside)
        with ThreadPoolExecutor(TOGETHER) as pool:
            entries = dict(zip(changed, pool.map(lambda name: _entry(kept_aside / name, now[name][1]), changed)))
        # 3. The index, and then what it does not name any more.
        self._gone = sorted(name for name in {*self._gone, *self._files} if name not in now)
        self._files = {name: entries.get(name) or self._files[name] for name in now}
        self._hold(leaving)
        self._sent = now
        for name in self._gone:
            self.bucket.remove(name)
        self._gone = []
        shutil.rmtree(kept_aside, ignore_errors=True)
        return None

    def _send(self, names: Sequence[str], folder: Path) -> None:
        """Write objects from the files of a folder, and meanwhile go on to say that this one writes."""
        pool = ThreadPoolExecutor(TOGETHER)
        try:
            left: set[Future[None]] = {pool.submit(self.bucket.put, name, folder / name) for name in names}
            while left:
                done, left = wait(left, timeout=self._every, return_when=FIRST_EXCEPTION)
                for one in done:
                    one.result()
                if left:
                    self._hold()
        finally:  # where one fails the others would, one after the other, for minutes each
            pool.shutdown(cancel_futures=True)

    def _kept_aside(self, place: Path) -> dict[str, tuple[int, int]] | None:
        """Keep what is new in the twin as it is at one moment; return size and time of every file at that moment.

        Files are replaced, not changed, but for logs, which grow. So where the same files are there before and after,
        what was taken between is of one moment. None: that was not to be had.
        """
        for _ in range(20):
            shutil.rmtree(place, ignore_errors=True)
            before = _listed(self.folder)
            seen = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in before.items()}
            try:
                for name in seen:
                    if self._sent.get(name) != seen[name]:
                        _take(self.folder / name, place / name)
            except FileNotFoundError:
                continue
            after = _listed(self.folder)
            if {name: s.st_ino for name, s in before.items()} == {name: s.st_ino for name, s in after.items()}:
                return seen
        return None


def _fetch(bucket: Bucket, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Fetch the files of an index that are not in `folder`, with their times."""
    # One that was written over since, by a round that was cut short, is newer than the index, and as good.
    for _ in range(2):
        missing = {name: entry["size"] for name, entry in files.items() if not _is(folder / name, entry)}
        if not missing:
            return
        fetch(bucket, missing, folder)
        for name in missing:
            if sha256_file(folder / name) == files[name]["sha256"]:
                os.utime(folder / name, ns=(files[name]["time"],) * 2)


def _entry(path: Path, time: int) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path), "time": time}


def _is(path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["time"])


def _listed(folder: Path) -> dict[str, os.stat_result]:
    """Return the files below `folder` that belong to others too, by their names."""
    found = {}
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _unsent(name)]
        for name in files:
            path = Path(where, name)
            with contextlib.suppress(FileNotFoundError):
                if not _unsent(name):
                    found[path.relative_to(folder).as_posix()] = path.stat()
    return found


def _unsent(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _UNSENT)


def _take(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if file.stat().st_size >= SMALL:  # a smaller one may be a log, which grows
        with contextlib.suppress(OSError):  # a file system without links
            os.link(file, to)
            return
    shutil.copyfile(file, to)


def _machine() -> str:
    """Name where a process number means something: this boot of this host, and the namespace of its processes."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return platform.node()


def _dead(writer: Mapping[str, Any]) -> bool:
    """Whether a writer has run on this machine, and does not any more."""
    if writer["machine"] != _machine():
        return False
    try:
        os.kill(writer["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return writer["process"] == os.getpid()  # an earlier command of this very process
