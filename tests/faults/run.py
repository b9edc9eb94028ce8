"""Faults over a whole run: `make soak` calls it. Every part ends with a line; the last line is the sum.

python tests/faults/run.py kill      killed at every point where a run writes, and given again each time
python tests/faults/run.py full      no space left, at every one of them
python tests/faults/run.py interrupt Ctrl-C, likewise
python tests/faults/run.py long      thousands of updates: memory, files, programs; then the same with a hundred kills

With --each a point is another one in each stage, scorer and split: three times as many.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import MICRO

from faults import long_run
from faults.inject import STAGES, forked, install

# As much of the product as one run can have: shards, looks at held-out pairs, proposals, samples, the export.
RUN = [
    "run", "--config", MICRO, "--config.annotate.pairs_per_shard=8", "--config.student_proposed.steps=4",
    "--config.positive.eval_every=2", "--config.positive.keep_best=rewards/accuracies",
]  # fmt: skip
PARTS = ("kill", "full", "interrupt", "long")
MOST = 2000  # runs; no fault may come for ever


def run(workdir: Path, fault: str = "", points: Path | None = None, each: bool = False) -> int:
    """The run in a process of its own; see `inject.install`. Returns its exit code."""

    def work() -> int:
        from ctpd_jax.cli import main

        if points:
            install(workdir, points, fault, each)
        return main([*RUN, "--workdir", str(workdir)])

    return forked(work, workdir.with_suffix(".log"))


def outcome(workdir: Path, stages: Sequence[str] = STAGES) -> dict[str, object]:
    """What has to be the same, bit for bit: parameters, export, evaluation, store, and that all was told once."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    told = [(line["stage"], line["step"], line.get("loss")) for line in lines]
    return {
        **{stage: json.loads((workdir / stage / "done.json").read_text())["params"] for stage in stages},
        "export": (workdir / "export" / "model.safetensors").read_bytes(),
        "evaluation": json.loads((workdir / "evaluation.json").read_text(), object_hook=timeless),
        "store": sorted(path.read_bytes() for path in workdir.glob("annotations/*.array_record*")),
        "told": sorted(told, key=str),
        "left over": [path.name for path in workdir.rglob("*") if path.name.endswith((".partial", ".old", ".tmp"))],
    }


def timeless(found: dict[str, object]) -> dict[str, object]:
    """Without what the clock says, and the sums over it."""
    return {name: value for name, value in found.items() if name not in long_run.CLOCK}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return [name for name in one if one[name] != other[name]]


def at_every_point(fault: str, folder: Path, most: int, each: bool) -> tuple[int, int]:
    """Gives the run again until no new point comes. Returns how often the fault came, and the failures."""
    whole, struck = folder / "whole", folder / fault
    if not (whole / "export.json").exists() and (code := run(whole)):
        sys.exit(f"The undisturbed run ended with {code}: see {whole.with_suffix('.log')}")
    points, log, failures, began = folder / f"{fault}.points", struck.with_suffix(".log"), 0, time.monotonic()
    expected = {"kill": -9, "full": 2, "interrupt": 130}[fault]
    sentence = {"kill": "", "full": "there is no space left", "interrupt": "the same command goes on"}[fault]
    for number in range(most):
        size, before = log.stat().st_size if log.exists() else 0, lines(points)
        code = run(struck, fault, points, each)
        said = log.read_bytes()[size:].decode(errors="replace") if log.exists() else ""
        if code == 0 and lines(points) == before:
            break
        point = lines(points)[-1]
        fine = code == expected and (not sentence or sentence in said.splitlines()[-1])
        failures += not fine
        print(f"{number + 1:4} {'' if fine else f'FAILED with {code}: '}{point}", flush=True)
        if not fine:
            print("     " + "\n     ".join(said.splitlines()[-12:]), flush=True)
    else:
        print(f"{fault}: it came {most} times; the rest was not tried.")
    # Whatever came: the same command has ended, with the same.
    if run(struck):
        failures += 1
        print("FAILED: the run does not end any more.")
    elif differs := differences(outcome(whole), outcome(struck)):
        failures += 1
        print("FAILED: after all of them differ " + ", ".join(differs))
    count = len(lines(points))
    print(f"{fault}: at {count} points, {failures} failures, {time.monotonic() - began:.0f} s", flush=True)
    return count, failures


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="of " + ", ".join(PARTS) + " (default: all)")
    parser.add_argument("--each", action="store_true", help="points of every stage by themselves")
    parser.add_argument("--dir", type=Path, help="where the runs lie, and stay; else a temporary folder")
    parser.add_argument("--most", type=int, default=MOST, help="faults of a kind")
    parser.add_argument("--updates", type=int, default=2000, help="of the long run")
    parser.add_argument("--restarts", type=int, default=100, help="of the long run")
    known = parser.parse_args()
    folder = known.dir or Path(tempfile.mkdtemp(prefix="ctpd-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    _import_everything(folder)
    told, failures = [], 0
    if unknown := set(known.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}")
    for part in known.parts or PARTS:
        if part == "long":
            said, failed = long_run.run(folder, known.updates, known.restarts)
        else:
            count, failed = at_every_point(part, folder, known.most, known.each)
            said = f"{part} at {count} points"
        told, failures = [*told, said], failures + failed
    print(f"soak: {', '.join(told)}, {failures} failures")
    if not known.dir:
        shutil.rmtree(folder)
    return min(failures, 1)


def _import_everything(folder: Path) -> None:
    # Before the forks, which then begin at once. No device is opened here: a fork could not use it.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compile_cache")}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    import ctpd_jax

    for module in pkgutil.walk_packages(ctpd_jax.__path__, "ctpd_jax."):
        importlib.import_module(module.name)


if __name__ == "__main__":
    sys.exit(main())
