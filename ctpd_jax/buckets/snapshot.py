"""A folder as it is at one moment: which files it has, a copy of those that are new, and its way back from a bucket."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpd_jax.artifacts import sha256_file
from ctpd_jax.buckets.objects import SMALL, Bucket, fetch
from ctpd_jax.errors import UserError

# Files of one process, half-written ones, and what changes whenever it is read.
_UNSENT = ("lock", ".index*", "*.partial", "*.old", "*.orbax-checkpoint-tmp*", "*-atime")
_LOGS = ("*.jsonl", "*.tfevents.*")  # grow; everything else is replaced

Seen = tuple[int, int]  # size and time of a file


def kept_aside(folder: Path, place: Path, sent: Mapping[str, Seen]) -> dict[str, Seen] | None:
    """Keep in `place` what differs from how it was `sent`, as it is at one moment; return all files as they are then.

    Files are replaced, not changed, but for logs, which grow. So where the same files are there before and after,
    what was taken between is of one moment. None: that was not to be had.
    """
    for _ in range(20):
        shutil.rmtree(place, ignore_errors=True)
        before = listed(folder)
        seen = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in before.items()}
        try:
            for name in seen:
                if sent.get(name) != seen[name]:
                    _take(folder / name, place / name)
        except FileNotFoundError:
            continue
        after = listed(folder)
        if {name: s.st_ino for name, s in before.items()} == {name: s.st_ino for name, s in after.items()}:
            return seen
    return None


class Otherwise(UserError):
    """An object does not hold what its index says."""


def restore(bucket: Bucket, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Fetch the files of an index that are not in `folder`, with their times."""
    missing = {name: entry["size"] for name, entry in files.items() if not is_as(folder / name, entry)}
    if missing:
        fetch(bucket, missing, folder, {name: files[name].get("object", name) for name in missing})
    for name in missing:
        if sha256_file(folder / name) != files[name]["sha256"]:
            (folder / name).unlink()
            raise Otherwise(
                f"{bucket.url}/{name} is not what its index says; remove it there, and what it belongs to is made anew."
            )
        os.utime(folder / name, ns=(files[name]["time"],) * 2)


def entry_of(path: Path, time: int) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path), "time": time}


def is_as(path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["time"])


def listed(folder: Path) -> dict[str, os.stat_result]:
    """Return the files below `folder` that belong to others too, by their names."""
    found = {}
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _unsent(name)]
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                raise UserError(
                    f"{where}/{name} is a link to a folder, which is not sent; put the folder itself there."
                )
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
    if file.stat().st_size >= SMALL and not any(fnmatch.fnmatchcase(file.name, log) for log in _LOGS):
        with contextlib.suppress(OSError):  # a file system without links
            os.link(file, to)
            return
    shutil.copyfile(file, to)
