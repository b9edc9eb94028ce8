"""Files in a bucket: gs://, s3://, hf://, whatever fsspec has a package for. Nothing else here speaks to one.

What is only read, a model or data, is fetched into a cache once, and again where the store says that it has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from tqdm import tqdm

from ctpd_jax.artifacts import PARTIAL, Broken, is_url, read_record, write_record
from ctpd_jax.errors import UserError, without_secrets
from ctpd_jax.processes import messages

SMALL = 16 << 20  # bytes: what is there in a moment
TOGETHER = 8  # files that are under way at once
_UNREAD = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}  # other forms of a model, never read

Found = TypeVar("Found")


def cache(kind: str, url: str) -> Path:
    """Return the local folder for what belongs to a URL: below CTPD_CACHE, or ~/.cache/ctpd_jax."""
    root = os.environ.get("CTPD_CACHE") or os.path.join("~", ".cache", "ctpd_jax")
    name = quote(without_secrets(url.rstrip("/")), safe="")
    if len(name) > 200:  # of the 255 that a name can have
        name = name[:150] + hashlib.sha256(name.encode()).hexdigest()[:40]
    return Path(os.path.expanduser(root)).absolute() / kind / name


@dataclass(frozen=True)
class Bucket:
    """What lies below `url`; names are relative to it, with slashes, and "" is the object `url` itself.

    Methods raise FileNotFoundError for an object that is not there, and UserError where the store does not answer: what
    fails at first, its client has tried again by then.
    """

    url: str
    root: str
    fs: Any

    @classmethod
    def open(cls, url: str) -> Bucket:
        """Raises UserError for a scheme that nobody knows, or whose package is not installed."""
        from fsspec.core import url_to_fs  # 75 ms, which a local run need not wait for

        try:
            # What another machine writes meanwhile must be seen.
            fs, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except Exception as error:  # each client has errors of its own
            raise UserError(f"{url} cannot be opened ({_said(error)}).") from error
        if not root.strip("/"):
            raise UserError(f"{url} names no bucket.")
        return cls(url.rstrip("/"), root.rstrip("/"), fs)

    def names(self) -> dict[str, dict[str, Any]]:
        """Return what the store says of every file below, {name: {"size": bytes, ...}}; {} where there is nothing."""
        try:
            found = self._asked("be listed", lambda: self.fs.find(self.root, detail=True))
        except FileNotFoundError:
            return {}
        # A console makes folders of objects without bytes.
        folders = {parent for path in found for parent in map(str, PurePosixPath(path).parents)}
        files = {path: info for path, info in found.items() if path.rstrip("/") not in folders and path[-1] != "/"}
        return {path.removeprefix(self.root).lstrip("/"): info for path, info in files.items()}

    def has(self, name: str) -> bool:
        """Ask for one object by its name."""
        try:
            self._asked("be read", lambda: self.fs.info(self._at(name)))
        except FileNotFoundError:
            return False
        return True

    def get(self, name: str, to: Path, counted: Callable[[int], object] = lambda size: None) -> None:
        """Fetch an object: written beside `to`, then renamed."""
        from fsspec.callbacks import Callback

        done = 0

        def count(size: int | None, value: int, **_: object) -> None:
            nonlocal done
            counted(value - done)  # less than nothing where it begins anew
            done = value

        beside, hooks = to.with_name(to.name + PARTIAL), {"count": count}
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            self._asked(
                "be read", lambda: self.fs.get_file(self._at(name), str(beside), callback=Callback(hooks=hooks))
            )
            os.replace(beside, to)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"{error.filename2 or error.filename} is in the way of {self.url}; remove it.") from error

    def put(self, name: str, file: Path) -> None:
        """Write an object; a reader sees the old one or the new one, as buckets have it."""
        try:
            self._asked("be written", lambda: self.fs.put_file(str(file), self._at(name)))
        except FileNotFoundError as error:
            raise UserError(f"{self.url} cannot be written: there is no such bucket ({_said(error)}).") from error

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._asked("be removed", lambda: self.fs.rm_file(self._at(name)))

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _asked(self, what: str, work: Callable[[], Found]) -> Found:
        try:
            return work()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except Exception as error:  # each client has errors of its own
            raise UserError(f"{self.url} cannot {what} ({_said(error)}).") from error


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def check_inside(url: str, name: str) -> None:
    """Raise UserError for a name that would lead out of its folder: what a bucket lists is a stranger's word."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{url} lists {name!r}, which lies outside of it.")


def fetch(bucket: Bucket, sizes: Mapping[str, int], folder: Path, objects: Mapping[str, str] | None = None) -> None:
    """Fetch objects into files of the same names, or those that have others by `objects`; sizes in bytes."""
    total = sum(sizes.values())
    name_of, soon = objects or {}, total < SMALL or messages.quiet()
    with (
        tqdm(total=total, desc=without_secrets(bucket.url), unit="B", unit_scale=True, disable=soon) as bar,
        ThreadPoolExecutor(TOGETHER) as pool,
    ):
        for _ in pool.map(lambda name: bucket.get(name_of.get(name, name), folder / name, bar.update), sizes):
            pass


def at_hand(path: str | os.PathLike[str], weights: bool = True) -> Path:
    """Return where a user's file or folder lies on this machine; one of a bucket is fetched, as `fetched` does."""
    text = os.fspath(path)
    return fetched(text, weights) if is_url(text) else Path(text).expanduser()


@lru_cache(maxsize=32)  # a store is asked once by a command
def fetched(url: str, weights: bool = True) -> Path:
    """Return a local copy of a file, or of a folder with what is read of a model or of data.

    What was fetched before is kept where the store still says the same of it. Without `weights` no .safetensors.

    Raises:
      UserError: nothing is there, or the store does not answer.
    """
    # 1. What is there now, and what the store says of it. A file is listed as itself, without a name below.
    bucket = Bucket.open(url)
    infos = bucket.names()
    if not infos:
        raise UserError(f"There is nothing at {url}.")
    for name in infos.keys() - {""}:
        check_inside(url, name)
    now = {name: json.dumps(info, sort_keys=True, default=str) for name, info in infos.items()}
    unread = _UNREAD if weights else {*_UNREAD, ".safetensors"}
    read = {name for name in now if PurePosixPath(name).suffix not in unread}
    # 2. What was fetched before, and is the same. Processes of one machine share the copy.
    place = cache("inputs", bucket.url)
    noted, copy = place / "fetched.json", place / "copy" / PurePosixPath(bucket.root).name
    with locked(place):
        before: dict[str, Any] = {}
        with contextlib.suppress(Broken):
            before = read_record(noted) or {}
        for path in copy.rglob("*"):
            if path.is_file() and path.relative_to(copy).as_posix() not in now:
                path.unlink()
        kept = {name for name in now if before.get(name) == now[name] and (copy / name).is_file()}
        # 3. The rest. It is noted once it is there.
        if missing := {name: infos[name].get("size") or 0 for name in sorted(read - kept)}:
            try:
                fetch(bucket, missing, copy)
            except FileNotFoundError as error:
                raise UserError(f"{url} changes while it is fetched: {error}; give the command again.") from error
            write_record(noted, {name: now[name] for name in read | kept})
    return copy


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Let one process of this machine at a time into the block."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "a", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
