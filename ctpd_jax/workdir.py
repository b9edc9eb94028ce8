"""What a run's folder remembers of each stage: what went in, that it is finished, and what came out.

DIR/<stage>/inputs.json   written first: the settings and files that this stage depends on
DIR/<stage>/done.json     written last: the stage is finished; holds what later stages need to know of it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctpd_jax import files
from ctpd_jax.errors import UserError
from ctpd_jax.files import write_json


def read_json(path: Path) -> Any:
    """Returns the content, or None where there is no such file. Raises UserError where it is not JSON."""
    return files.read_json(path, "remove that folder and run the stage again")


def first_difference(expected: Any, found: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """(dotted field, expected, found) of the first field of `expected` that `found` does not have or has otherwise.

    Fields that only `found` has are no difference. Both are compared as JSON would hold them (a tuple is a list).
    """
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            inner = f"{field}.{key}" if field else str(key)
            if not isinstance(found, Mapping) or key not in found:
                return inner, value, "nothing"
            if difference := first_difference(value, found[key], inner):
                return difference
        return None
    plain = json.loads(json.dumps(expected))
    same = plain == found and isinstance(plain, bool) == isinstance(found, bool)  # else True would equal 1
    return None if same else (field, expected, found)


def require_same(expected: Mapping[str, Any], found: Any, where: Path, advice: str) -> None:
    """Raises UserError naming the first field of `expected` that `found`, read from `where`, has otherwise."""
    if difference := first_difference(expected, found):
        field, wanted, there = difference
        raise UserError(f"{where} was made otherwise: {field} is {there!r} there and {wanted!r} here. {advice}")


def begin(
    directory: Path,
    inputs: Mapping[str, Any],
    noted: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any] | None:
    """Opens a stage's folder. Returns what its `done.json` holds, or None where the stage has work left.

    `noted` are settings that change no number beyond rounding: kept beside the inputs, and told where they differ.
    Raises UserError where the folder was made from other inputs.
    """
    path, noted = directory / "inputs.json", dict(noted or {})
    stored, done = read_json(path), read_json(directory / "done.json")
    if stored is None:
        directory.mkdir(parents=True, exist_ok=True)
    else:
        before = stored.pop("noted", {}) if isinstance(stored, dict) else {}
        if not done and (changed := first_difference(noted, before)):
            field, now, then = changed
            say(f"{directory.name} goes on with {field} {now!r}, begun with {then!r}: its numbers change by rounding.")
        advice = f"Go back to those settings, take another --workdir, or delete {directory} to make the stage again."
        require_same(inputs, stored, path, advice)
        if gone := first_difference(stored, inputs):
            raise UserError(f"{path} was made otherwise: {gone[0]} is {gone[1]!r} there and nothing here. {advice}")
    if not done:
        write_json(path, {**inputs, "noted": noted})
    return done


def finish(directory: Path, result: Mapping[str, Any]) -> None:
    write_json(directory / "done.json", dict(result))
