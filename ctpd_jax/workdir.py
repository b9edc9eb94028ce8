"""What a run's folder remembers of each stage: what went in, that it is finished, and what came out.

DIR/<stage>/inputs.json   written first: the settings and files that this stage depends on
DIR/<stage>/done.json     written last: the stage is finished; holds what later stages need to know of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def begin(directory: Path, inputs: Mapping[str, Any], write: bool = True) -> dict[str, Any] | None:
    """Opens a stage's folder. Returns what its `done.json` holds, or None where the stage has work left.

    `write` says whether this process, of several, is the one that notes down the inputs.
    Raises UserError where the folder was made from other inputs.
    """
    path = directory / "inputs.json"
    stored = read_json(path)
    if stored is None and not write:
        return None
    if stored is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(inputs))
    else:
        advice = f"Go back to those settings, take another --workdir, or delete {directory} to make the stage again."
        require_same(inputs, stored, path, advice)
        if gone := first_difference(stored, inputs):
            raise UserError(f"{path} was made otherwise: {gone[0]} is {gone[1]!r} there and nothing here. {advice}")
    return read_json(directory / "done.json")


def finish(directory: Path, result: Mapping[str, Any]) -> None:
    write_json(directory / "done.json", dict(result))
