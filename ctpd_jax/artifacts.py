"""Artifacts: files and folders that are whole or not there, and that say what they were made from.

Whole: everything is written beside its place and renamed; a folder counts once its seal, one JSON file that is written
last, lies in it. A kill at any moment leaves the old artifact, the new one, or none.
Made from the same: the seal holds the fields that decide the artifact. `opened` refuses another one, naming the first
field that differs and both values; `kept` takes it for absent, where making it anew is cheap.
As it was written: a record, which is a JSON object of ours, holds the SHA-256 of itself; a seal also that of the files,
where a flipped bit would go unnoticed.

    workdir/STAGE/       inputs.json (what it is made from, written first), done.json (the seal)
    a checkpoint         checksums.json, with what tells of its values, files and itself that they are as written
    annotations/         manifest.json, with the SHA-256 of its files
    a scorer's column    identity.json (written first); every shard begins with its own SHA-256
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError

FORMAT = 2  # of seals that hold checksums
READ = (1, 2)  # the first noted the SHA-256 of every file
PARTIAL = ".partial"  # what is written beside carries this suffix until it is whole
ANEW = "remove it, and the command of its stage makes it anew"


class Broken(UserError):
    """An artifact is not whole, or not as it was written; the message says which file, and why."""


# ------------------------------------------------------------------------------------------------ files


def is_url(path: object) -> bool:
    """Return whether a path is one of a bucket, as gs://NAME/run; what begins with http is a server."""
    return isinstance(path, str) and "://" in path and not path.lower().startswith(("http://", "https://"))


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` as an absolute Path. Raises UserError for gs:// and the like, which has no place here."""
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"{text} is not a folder of this machine; give the path of one.")
    return Path(text).expanduser().absolute()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename: a reader, or the next run after a kill, sees the old file or the new.

    Raises UserError where a device or a pipe is there, which the rename would replace.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is no file, and nothing else is replaced by one; name another.")
    # The bytes must be on the disk before the name points to them.
    beside = path.with_name(path.name + PARTIAL)
    with open(beside, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all. Raises ValueError for NaN and infinity: JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # half of a surrogate pair, as JSON spells it


def read_json(path: Path, advice: str = ANEW) -> Any:
    """Return what a JSON file holds, or None where there is none. Raises Broken, with `advice`, if it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Broken(f"{path} cannot be read ({error.strerror or error}); {advice}.") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        refuse_impostor(path, data)
        raise Broken(f"{path} is damaged ({error}); {advice}.") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON file of a model folder, None where there is none. Raises UserError where it is no object."""
    value = read_json(path, "mend it, or fetch the model again")
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; mend it, or fetch the model again.")
    return value


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object of ours as indented JSON, whole or not at all, with the SHA-256 of itself."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # as it will be read
    write_json(path, {**plain, "sha256": hashlib.sha256(canonical_json(plain)).hexdigest()})


def read_record(path: Path, advice: str = ANEW) -> dict[str, Any] | None:
    """Return what `write_record` wrote, or None where there is no file.

    Raises Broken, with `advice`, if it is damaged. An object without a SHA-256 is one of an earlier version's.
    """
    value = read_json(path, advice)
    if value is not None and not unchanged(value):
        raise Broken(f"{path} is damaged (it is not what was written); {advice}.")
    return value


def unchanged(value: Any) -> bool:
    """Tell whether a JSON value is an object as it was written, by the SHA-256 in it, which is taken out."""
    if not isinstance(value, dict) or not value:
        return False
    claimed = value.pop("sha256", None)
    try:
        return claimed is None or claimed == hashlib.sha256(canonical_json(value)).hexdigest()
    except (ValueError, RecursionError):  # NaN, or deeper than anything that is written
        return False


def canonical_json(value: Any) -> bytes:
    """Spell equal values alike: what the hash of a JSON value is taken over."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")  # as `write_json` spells it


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Raise UserError where a file's first bytes show that it is another kind of file, and say which one."""
    start = head[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for magic, what in _IMPOSTORS.items():
        if start.startswith(magic):
            raise UserError(f"{path} {what}.")


# ------------------------------------------------------------------------------------------------ made from the same


def first_difference(expected: Any, found: Any, exactly: bool = False, field: str = "") -> tuple[str, Any, Any] | None:
    """Return (dotted field, expected, found) of the first field that differs, in the order of `expected`; else None.

    Both are compared as JSON holds them (a tuple is a list). Fields that only `found` has differ where it is to be
    `exactly` the same.
    """
    # A value: whole, and with its type.
    if not isinstance(expected, Mapping):
        plain = json.loads(json.dumps(expected))
        same = plain == found and isinstance(plain, bool) == isinstance(found, bool)  # else True would equal 1
        return None if same else (field, expected, found)
    # An object: field by field.
    there = found if isinstance(found, Mapping) else {}
    prefix = f"{field}." if field else ""
    for key, value in expected.items():
        if key not in there:
            return f"{prefix}{key}", value, "nothing"
        if difference := first_difference(value, there[key], exactly, f"{prefix}{key}"):
            return difference
    more = [key for key in there if key not in expected] if exactly else []
    return (f"{prefix}{more[0]}", "nothing", there[more[0]]) if more else None


def require_same(expected: Any, found: Any, where: Path, advice: str, exactly: bool = False) -> None:
    """Raise UserError where `found`, read from the file `where`, is not as expected: the field and both values."""
    if difference := first_difference(expected, found, exactly):
        field, wanted, there = difference
        raise UserError(f"{where} was made otherwise: {field} is {there!r} there and {wanted!r} here. {advice}")


def opened(path: Path, made_from: Mapping[str, Any], advice: str, mend: str = ANEW) -> dict[str, Any] | None:
    """Return what the seal `path` holds, or None where there is none.

    The seal may have more fields than `made_from`. Raises UserError, with `advice`, where one of these differs, and
    Broken, with `mend`, where it is damaged.
    """
    found = read_record(path, mend)
    if found is not None:
        require_same(made_from, found, path, advice)
    return found


def kept(path: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the seal `path` holds if it has exactly these fields, beside others; None means: make it anew."""
    found = None
    with contextlib.suppress(Broken):
        found = read_record(path)
    compared = {name: value for name, value in (found or {}).items() if name in made_from}
    return None if first_difference(made_from, compared, exactly=True) else found


def begin(
    directory: Path,
    inputs: Mapping[str, Any],
    noted: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any] | None:
    """Open the folder of a stage, or make it. Return what its `done.json` holds, or None where work is left.

    `noted` are settings that change no number beyond rounding: kept in `inputs.json` beside the others.
    Raises UserError where the folder was made from other inputs.
    """
    # 1. What went in before, and whether it is finished.
    directory.mkdir(parents=True, exist_ok=True)
    path, noted = directory / "inputs.json", dict(noted or {})
    advice = f"remove {directory} to make the stage again"
    stored, done = read_record(path, advice), read_record(directory / "done.json", advice)
    if done and stored is None:
        raise Broken(f"{path} is missing, so that nobody can say what is finished there; {advice}.")
    if stored is not None:
        # 2. Other numbers are refused; other rounding is told, where there is work left.
        before = stored.pop("noted", {})
        if not done and (changed := first_difference(noted, before)):
            field, now, then = changed
            say(f"{directory.name} goes on with {field} {now!r}, begun with {then!r}: its numbers change by rounding.")
        advice = f"Go back to those settings, take another --workdir, or delete {directory} to make the stage again."
        require_same(inputs, stored, path, advice, exactly=True)
    # 3. From here on the folder says what it is made from.
    if not done:
        write_record(path, {**inputs, "noted": noted})
    return done


def finish(directory: Path, result: Mapping[str, Any]) -> None:
    """Seal the folder of a stage; `result` is what later stages need to know of it."""
    write_record(directory / "done.json", result)


# ------------------------------------------------------------------------------------------------ as it was written


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return {name: SHA-256} of files in `folder`."""
    # Threads do: hashlib releases the interpreter lock.
    names = list(names)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_file(folder / name), names)))


def check_files(folder: Path, files: Mapping[str, str], read: bool = True) -> None:
    """Raise Broken where one of `files`, {name: SHA-256}, is missing or, if they are `read`, is not as written.

    Of a file with "" for its SHA-256 it is enough that it is there.
    """
    # First what costs nothing to see. Of what strangers wrote nothing outside of the folder is looked at.
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Broken(f"{folder} lists {name}, which lies outside of it")
        if not (folder / name).is_file():
            raise Broken(f"{folder / name} is missing")
    for name, sha256 in checksums(folder, [name for name in files if read and files[name]]).items():
        if sha256 != files[name]:
            raise Broken(f"{folder / name} is damaged (its SHA-256 is not the one that was written)")


def seal(path: Path, made_from: Mapping[str, Any], most: float = math.inf) -> None:
    """Write the seal `path` with size and SHA-256 of every file below its folder, and the SHA-256 of itself.

    Of files of more than `most` bytes only the size is noted: what they hold is checked otherwise.
    """
    folder = path.parent
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(path.name))
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(found)}
    hashes = checksums(folder, (name for name, size in sizes.items() if size <= most))
    # The seal is the one file that no other one vouches for.
    files = {name: [size, hashes.get(name, "")] for name, size in sizes.items()}
    content = {"format": FORMAT, **made_from, "files": files}
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    write_bytes(path, canonical_json({**content, "sha256": digest}))


def unseal(path: Path, read: bool = True) -> dict[str, Any]:
    """Return what `seal` wrote, once the seal and, if they are `read`, all files were found as they were written.

    Raises Broken where one was not, and UserError where another version wrote the seal.
    """
    # 1. The seal itself, which no version writes without its SHA-256.
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Broken(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or "sha256" not in content or not unchanged(content):
        raise Broken(f"{path} is damaged")
    # 2. A whole seal of another version is refused, not taken for a broken one: what is broken gets removed.
    if content["format"] not in READ:
        raise UserError(f"{path} has format {content['format']}; this version reads formats up to {FORMAT} only.")
    # 3. The files.
    if read:
        folder, files = path.parent, content["files"]
        check_files(folder, {name: sha256 for name, (_, sha256) in files.items()})
        for name, (size, _) in files.items():
            if (there := (folder / name).stat().st_size) != size:
                raise Broken(f"{folder / name} is damaged ({there:,} bytes; {size:,} were written)")
    return content


# ------------------------------------------------------------------------------------------------ folders


@contextlib.contextmanager
def replacing_folder(directory: Path, holds: str, what: str, ours: Callable[[str], bool]) -> Iterator[Path]:
    """Give a new folder beside `directory`, which takes its place when the block ends well: whole or not there.

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

    # 1. Put right what a killed process has left; refuse a folder of somebody else's.
    clear()
    if directory.exists() and not (directory / holds).exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not {what}; remove it, or choose another place.")
    # 2. The caller fills the new folder; then it changes places with the old one.
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
    """Link what is not `ours` and not in `beside` yet; a file system without hard links gets a copy."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    def left_out(folder: str, names: list[str]) -> list[str]:
        at_the_top = Path(folder) == directory
        return [name for name in names if at_the_top and (ours(name) or os.path.lexists(beside / name))]

    # Symbolic links stay links.
    shutil.copytree(directory, beside, True, left_out, link, dirs_exist_ok=True)
