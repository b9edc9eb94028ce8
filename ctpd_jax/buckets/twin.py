"""A workdir in a bucket: the run works in a local twin of it, and what it writes is sent after it.

A run that is killed at any moment leaves a folder from which it goes on. So a bucket that always holds the folder of
some moment is enough, and no stage needs to know of it. Every half a minute what is new in the twin is kept aside, as
it was at one moment, and sent; then one object, the index, names all that belongs together. An index is the old one or
the new one: nothing is renamed, and nothing that it names is removed or written over before the next one is there. So a
file that was replaced goes to an object of its own first, and to its own name once an index says so.

    URL/STAGE/...             as in a local workdir
    URL/ctpd-replaced/SHA256  what files were replaced by, on its way to their names
    URL/ctpd-index.json       {"files": {name: {"size", "sha256", "time"}}, "gone": [name], "writer": {...} or null};
                              a file may have an "object" that holds it; "gone" may be there without being named

Who writes says in the index when it was last heard; another one waits until it has been silent for long.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ctpd_jax.artifacts import Broken, is_url, read_record, unchanged, write_record
from ctpd_jax.buckets.objects import SMALL, TOGETHER, Bucket, cache, check_inside, locked
from ctpd_jax.buckets.snapshot import Otherwise, Seen, entry_of, is_as, kept_aside, listed, restore
from ctpd_jax.errors import UserError, without_secrets
from ctpd_jax.processes import messages
from ctpd_jax.processes.together import several

INDEX = "ctpd-index.json"
REPLACED = "ctpd-replaced"
NOTE = ".index.json"  # in a twin: the index as it was sent last
NEXT = ".index-next.json"  # and the one that was on its way
WRITER = ".index-writer.json"  # in a copy that is only looked at: who has its original
EVERY = 30.0  # seconds from one look at the twin to the next; CTPD_BUCKET_SECONDS
LONGEST = 60.0  # that it may be
SILENT = 120.0  # seconds after which a writer counts as dead
SETTLED = 3.0  # seconds after which whoever saw the same dead writer has written its own name
HOUR = 3600.0  # clocks of two machines do not differ by more

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
        self._sent: dict[str, Seen] = {}  # each file as it was sent
        self._me = {"id": uuid.uuid4().hex, "process": os.getpid(), "host": platform.node(), "machine": _machine()}
        self._me["folder"] = str(self.folder)
        self._ours = {self._me["id"]}  # this writer, and the dead one that it comes after
        self._lost = False
        self._every = every()
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._follow, daemon=True)

    def take(self) -> None:
        """Become the one who writes: the twin gets what is new in the bucket, the bucket what is new in the twin."""
        # 1. Nobody else writes, and what is there is a run.
        self.folder.mkdir(parents=True, exist_ok=True)
        index, there = self._wait_for_writer(), self.bucket.names()
        if not index and there:
            raise UserError(f"{self.url} holds files, but no run: there is no {INDEX}. Take another --workdir.")
        if not index and listed(self.folder):
            messages.say(f"{self.url} is empty: {self.folder} is sent. Remove that folder to begin anew.")
        before = index.get("writer")
        self._ours |= {before["id"]} if before else set()
        self._files, self._gone = index.get("files", {}), index.get("gone", [])
        # 2. What somebody has removed there is removed here: it is how a stage is made anew.
        removed = self._files.keys() - self._there(self._files, there).keys()
        self._files = {name: entry for name, entry in self._files.items() if name not in removed}
        self._move_aside(name for name in removed if (self.folder / name).exists())
        # 3. A twin that goes back to this very index may be ahead of it; any other one is behind.
        if index and not self._descends_from(index):
            self._clear()
            restore(self.bucket, self._files, self.folder)
        self._sent = {name: (e["size"], e["time"]) for name, e in self._files.items() if "object" not in e}
        # 4. From here on the bucket says who writes; of two that came after the same one, the last.
        self._hold()
        if before and before["machine"] != _machine():
            time.sleep(SETTLED)
        self._round()
        messages.say(f"{self.url}: works in {self.folder}, and sends what is new every {self._every:g} s.")
        self._thread.start()

    def seen(self, small: bool) -> Path:
        """Return a folder to look at: the twin where it is the newest, else a copy beside it."""
        index = self._index()
        if not index:
            raise UserError(f"{self.url} holds no run: there is no {INDEX}.")
        # A command of this machine is ahead of what it has sent.
        writer = index["writer"]
        if writer and writer["machine"] == _machine() and not _dead(writer) and Path(writer["folder"]).is_dir():
            return Path(writer["folder"])
        if self._descends_from(index):
            return self.folder
        copy = self._place / ("glanced" if small else "looked")
        with locked(self._place / f"{copy.name}.lock"):
            for _ in range(3):
                files = {name: entry for name, entry in index["files"].items() if not small or entry["size"] < SMALL}
                try:
                    files = self._there(files, self.bucket.names())
                    restore(self.bucket, files, copy)
                    break
                except (FileNotFoundError, Otherwise):  # the run goes on
                    index = self._index() or index
            else:
                raise UserError(f"{self.url} changes while it is looked at; give the command again.")
            for name in listed(copy).keys() - files.keys():
                (copy / name).unlink()
            write_record(copy / WRITER, index["writer"] or {"heard": None})
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

    def _there(self, files: Mapping[str, Index], names: Collection[str]) -> dict[str, Index]:
        """Return those files of an index whose objects are there, also where the bucket lists them late."""
        objects = {name: entry.get("object", name) for name, entry in files.items()}
        return {n: e for n, e in files.items() if objects[n] in names or self.bucket.has(objects[n])}

    def _clear(self) -> None:
        """Make room for what the bucket has; what never was in it is moved aside."""
        was: Index = {}
        with contextlib.suppress(Broken):
            was = (read_record(self.folder / NOTE) or {}).get("files", {})
        behind = [n for n in listed(self.folder) if n not in self._files or not is_as(self.folder / n, self._files[n])]
        sent = {name for name in behind if name in was and is_as(self.folder / name, was[name])}
        for name in sent:
            (self.folder / name).unlink()
        self._move_aside(name for name in behind if name not in sent)

    def _move_aside(self, names: Iterable[str]) -> None:
        """Nothing that may be the only copy is removed."""
        aside = self._place / "aside" / time.strftime("%Y%m%d-%H%M%S")
        for name in names:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / name, aside / name)
        if aside.exists():
            messages.say(f"{self.url}: what is in {self.folder}, but not there, lies in {aside} now.", logging.WARNING)

    # ------------------------------------------------------------------------------------------------ the index

    def _index(self) -> Index:
        """Return what the index holds, {} where there is none."""
        file = self._place / f"{self._me['id']}.json"  # others of this machine may look meanwhile
        try:
            self.bucket.get(INDEX, file)
            data = file.read_bytes()
        except FileNotFoundError:
            return {}
        finally:
            file.unlink(missing_ok=True)
        index = None
        with contextlib.suppress(ValueError, RecursionError):
            index = json.loads(data)
        if not isinstance(index, dict) or "sha256" not in index or not unchanged(index):
            raise UserError(f"{self.url}/{INDEX} is damaged; take another --workdir, or remove all of {self.url}.")
        for name in [*index["files"], *index["gone"], *(e.get("object", "x") for e in index["files"].values())]:
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
        write_record(self.folder / NEXT, index)
        self.bucket.put(INDEX, self.folder / NEXT)
        os.replace(self.folder / NEXT, self.folder / NOTE)

    def _descends_from(self, index: Index) -> bool:
        """Whether the twin was in the state of this index, so that whatever differs is newer than it."""
        # One that was emptied, in whole or by half, is no newer state: its files are in the bucket.
        files = index.get("files", {})
        lost = [name for name in files if not (self.folder / name).exists()]
        with contextlib.suppress(Broken):
            same = any(read_record(self.folder / note) == index for note in (NOTE, NEXT))
            return same and 2 * len(lost) <= len(files) and "config.json" not in lost
        return False

    def _wait_for_writer(self) -> Index:
        """Return the index once nobody else writes."""
        index = self._index()
        if not (first := index.get("writer")) or _dead(first):
            return index
        who, began = f"process {first['process']} on {first['host']}", time.monotonic()
        silent = time.time() - first["heard"]
        here, silence = first["machine"] == _machine() and silent < 2 * SILENT, 0.0 if silent > HOUR else SILENT
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
        # 1. The twin as it is now.
        if not (self.folder / NOTE).exists():
            raise UserError(f"{self.folder} was removed while a run is at work in it; nothing of it is sent.")
        if self._ours == {self._me["id"]} and not self._index():  # the bucket was emptied: all of it is sent again
            self._files, self._gone, self._sent = {}, [], {}
        aside = self._place / "outgoing"
        now = kept_aside(self.folder, aside, self._sent)
        if now is None:
            if leaving:
                raise UserError(f"{self.folder} is written to by somebody else all the time.")
            return self._hold()
        # 2. What is new goes to its name, what was replaced to an object of its own. A kill may leave it behind: it is
        #    noted before.
        changed = [name for name, seen in now.items() if self._sent.get(name) != seen]
        with ThreadPoolExecutor(TOGETHER) as pool:
            entries = dict(zip(changed, pool.map(lambda name: entry_of(aside / name, now[name][1]), changed)))
        replaced = {name: f"{REPLACED}/{entries[name]['sha256']}" for name in changed if name in self._files}
        places = {name: replaced.get(name, name) for name in changed}
        if places:
            self._gone = sorted({*self._gone, *places.values()})
            self._hold()
            self._send(places, aside)
        # 3. The index.
        earlier = {entry["object"] for entry in self._files.values() if "object" in entry}
        files = {name: entries.get(name) or self._files[name] for name in now}
        self._gone = sorted({*self._gone, *self._files, *earlier} - files.keys() - set(replaced.values()))
        self._files = {n: e | {"object": replaced[n]} if n in replaced else e for n, e in files.items()}
        self._hold(leaving and not replaced)
        # 4. What was replaced goes to its name too, and an index says so.
        if replaced:
            self._send({name: name for name in replaced}, aside)
            self._files, self._gone = files, sorted({*self._gone, *replaced.values()})
            self._hold(leaving)
        self._sent = now
        # 5. What it does not name any more.
        for name in self._gone:
            self.bucket.remove(name)
        self._gone = []
        shutil.rmtree(aside, ignore_errors=True)
        return None

    def _send(self, places: Mapping[str, str], folder: Path) -> None:
        """Write files of a folder to their objects, and meanwhile go on to say that this one writes."""
        pool = ThreadPoolExecutor(TOGETHER)
        try:
            left = {pool.submit(self.bucket.put, place, folder / name) for name, place in places.items()}
            while left:
                done, left = wait(left, timeout=self._every, return_when=FIRST_EXCEPTION)
                for one in done:
                    one.result()
                if left:
                    self._hold()
        finally:  # where one fails the others would, one after the other, for minutes each
            pool.shutdown(cancel_futures=True)


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
