"""The toy world as files: two model folders and two files of preference pairs, made once and kept in a cache.

    ~/.cache/ctpd_jax/toy/            or below XDG_CACHE_HOME
        models-<format>-<seed>/       teacher/ and student/, in Hugging Face format; -<mismatch> where it is not "word"
        pairs-<format>-<settings>/    train.jsonl and test.jsonl

A folder is built beside its place and then renamed, so it is whole or not there. Two processes that build the same
folder at once do the same work, and the second one throws its own away.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError
from toy.world import NOISE, generate_pairs

FORMAT = 1  # raise it when a change in this package makes other files from the same settings
MISMATCHES = ("near", "word", "unigram")  # of the tokenizers; see models.py, which reading a config does not import
EXAMPLES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class World:
    """Where everything lies, as text for a config."""

    teacher: str
    student: str
    train: str
    test: str


def world_on_disk(
    pairs: int = 2000, test_pairs: int = 300, noise: float = NOISE, seed: int = 0, mismatch: str = "word"
) -> World:
    """Make what is not there yet, and return where it lies.

    Args:
      pairs, test_pairs: numbers of training and of held-out pairs.
      noise: share of swapped labels among the training pairs, at least 0 and below 0.5.
      seed: of the pairs, of the models' weights and of the text that their tokenizers are trained on.
      mismatch: of the two tokenizers: one of MISMATCHES.

    Raises:
      UserError: no pairs, a noise outside its range, an unknown mismatch, or models that cannot be made.
    """
    if pairs < 1 or test_pairs < 1:
        raise UserError(f"The toy world needs at least one pair a split, not {pairs} and {test_pairs}.")
    if not 0 <= noise < 0.5:
        raise UserError(f"The toy world's label noise is {noise}; it must be at least 0 and below 0.5.")
    if mismatch not in MISMATCHES:
        raise UserError(f"The toy world's mismatch is {mismatch!r}; choose one of {', '.join(MISMATCHES)}.")

    def write_pairs(folder: Path) -> None:
        for split, number in (("train", pairs), ("test", test_pairs)):
            rows = generate_pairs(split, number, noise=noise, seed=seed)
            lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")

    # The models do not depend on the pairs: worlds of every size share them.
    other = () if mismatch == "word" else (mismatch,)
    name = "-".join((f"models-{FORMAT}-seed{seed}", *other))
    models = _made(name, lambda folder: _make_models_apart(folder, seed, *other))
    data = _made(f"pairs-{FORMAT}-seed{seed}-{pairs}-{test_pairs}-noise{float(noise)}", write_pairs)
    return World(
        teacher=str(models / "teacher"),
        student=str(models / "student"),
        train=str(data / "train.jsonl"),
        test=str(data / "test.jsonl"),
    )


def settings_in(text: str, **defaults: Any) -> dict[str, Any]:
    """Read what stands behind the colon in `--config=configs/demo.py:pairs=100,noise=0.3`.

    Args:
      text: name=value, with commas between; empty for the defaults alone.
      defaults: the settings that may be named; a value is read as the type of its default.

    Raises:
      UserError: an unknown name, or a value of another type.
    """
    found = dict(defaults)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name] = type(defaults[name])(value)
        except (KeyError, ValueError):
            known = ",".join(f"{key}={default}" for key, default in defaults.items())
            raise UserError(f"The toy world does not understand {part!r}; its settings are {known}.") from None
    return found


def cache_folder() -> Path:
    """Return the folder that holds every toy world."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctpd_jax" / "toy"


def _made(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache, after `fill` has written it where it was not there."""
    folder = cache_folder() / name
    # A folder has its name only when all of it is there.
    if folder.is_dir():
        return folder
    print(f"toy: making {folder}", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as beside:
        built = Path(beside) / name
        built.mkdir()
        fill(built)
        try:
            built.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its folder is as good
                raise
    return folder


def _make_models_apart(folder: Path, seed: int, mismatch: str = "word") -> None:
    """Make the models in a process of their own.

    JAX may not start here: the run that reads the config has yet to choose its platform and to join the others. And
    what the environment tells JAX and its compiler must not change the last bits of weights that are kept.
    """
    # The same modules are found as here, wherever they were put on the path.
    path = os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, "-m", "toy.on_disk", str(folder), "--seed", str(seed), "--mismatch", mismatch]
    done = subprocess.run(
        command,
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"The toy models cannot be made in {folder}: {reason}")


def main() -> None:
    from toy.models import make_toy_models

    parser = argparse.ArgumentParser(description="Make the toy world's teacher and student.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mismatch", choices=MISMATCHES, default="word")
    arguments = parser.parse_args()
    make_toy_models(arguments.folder, arguments.seed, arguments.mismatch)


if __name__ == "__main__":
    main()
