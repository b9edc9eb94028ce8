"""What a run's folder remembers of each stage: what went in, that it is finished, and what came out.

DIR/<stage>/inputs.json   written first: the settings and files that this stage depends on
DIR/<stage>/done.json     written last: the stage is finished; holds what later stages need to know of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.files import write_json


def read_json(path: Path) -> Any | None:
    """Returns the content, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and run the stage again.") from error


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, so that a difference has a name."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in flatten(part, f"{prefix}.{key}" if prefix else key).items()}


def first_difference(stored: Mapping, wanted: Mapping) -> str | None:
    """Returns 'name is A there and B here' for the first entry that differs."""
    there, here = flatten(stored), flatten(json.loads(json.dumps(wanted)))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
    return None


def begin(directory: Path, inputs: Mapping) -> dict | None:
    """Opens a stage's folder. Returns what its `done.json` holds, or None where the stage has work left.

    Raises UserError where the folder was made from other inputs.
    """
    stored = read_json(directory / "inputs.json")
    if stored is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "inputs.json", inputs)
    else:
        difference = first_difference(stored, inputs)
        if difference:
            raise UserError(
                f"{directory} was made with other settings: {difference}. "
                "Go back to those settings, take another --workdir, or delete that folder to make the stage again."
            )
    return read_json(directory / "done.json")


def finish(directory: Path, result: Mapping) -> None:
    write_json(directory / "done.json", dict(result))
