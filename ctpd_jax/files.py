"""Files that are whole or not there: written beside, then renamed; and the SHA-256 that proves them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError

PARTIAL = ".partial"  # what is written beside carries this suffix until it is whole


def local_path(path: str | os.PathLike[str]) -> Path:
    """`path` as an absolute Path. Raises UserError for an address such as gs://: a rename there is not atomic."""
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"{text} is not a folder of this machine; mount the bucket (gcsfuse, NFS) and give that path.")
    return Path(text).expanduser().absolute()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` beside `path` and renames: a reader, or the next run after a kill, sees the old file or the new."""
    beside = path.with_name(path.name + PARTIAL)
    with open(beside, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, path)


@contextlib.contextmanager
def replacing_folder(directory: Path, holds: str, what: str, ours: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder beside `directory`, which takes its place when the block ends well: whole or not there.

    An earlier folder is replaced if it has the file `holds`, or nothing at all; one that holds anything else is
    refused. What lies in it and is not `ours`, by name, stays: it is linked into the new folder before that takes its
    place, so that at no moment it is missing. What a killed process left beside is removed, or put back, by the next.

    Raises:
        UserError: `directory` is not `what`, "a model folder".
    """
    directory = directory.resolve()  # a link to a folder stays a link
    beside, old = (directory.with_name(f".{directory.name}{suffix}{PARTIAL}") for suffix in ("", ".old"))

    def clear() -> None:
        if old.exists() and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()  # made anew by who started this process; what was there lies in `old`
        if old.exists() and not directory.exists():
            old.rename(directory)
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)

    clear()
    if directory.exists() and not (directory / holds).exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not {what}; choose another place.")
    beside.mkdir(parents=True)
    try:
        yield beside
        if directory.exists():
            _link_others(directory, beside, ours)
            directory.rename(old)  # nothing can be renamed onto a folder that holds files
        beside.rename(directory)
    finally:
        clear()


def _link_others(directory: Path, beside: Path, ours: Callable[[str], bool]) -> None:
    """What is not `ours` and not in `beside` yet goes there too; a file system without hard links gets a copy."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    for path in directory.iterdir():
        target = beside / path.name
        if ours(path.name) or target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=link)
        else:
            link(str(path), str(target))


# The first bytes of what often lies where a file of a model is looked for.
_IMPOSTORS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder, or fetch "
    "the model with `hf download`",
    b"<!doctype html": "is an HTML page, not the file: a download that failed, or a gated model; fetch it again",
    b"<html": "is an HTML page, not the file: a download that failed, or a gated model; fetch it again",
    b"pk\x03\x04": "is a PyTorch pickle under another name; save the model again with save_pretrained",
    b"gguf": "is a GGUF file; take the model in safetensors, in bfloat16 or float32",
}


def refuse_impostor(path: Path, head: bytes) -> None:
    """Raises UserError where a file's first bytes show that it is another kind of file, and say which one."""
    start = head[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for magic, what in _IMPOSTORS.items():
        if start.startswith(magic):
            raise UserError(f"{path} {what}.")


def read_json(path: Path, advice: str) -> Any:
    """The content of a JSON file, or None where there is no such file. Raises UserError, with `advice`, if damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        refuse_impostor(path, data)
        raise UserError(f"{path} is damaged ({error}); {advice}.") from None


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, whole or not there. NaN and infinity are refused (ValueError): JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # half of a surrogate pair, as JSON spells it


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values: what the hash of a JSON value is taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
