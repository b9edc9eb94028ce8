"""Which method trains the better student? On the toy world, whose true rewards are known, with intervals.

    python benchmarks/quality.py                                     # everything, an hour and a half on two cores
    python benchmarks/quality.py --worlds nominal --methods dpo,ctpd --seeds 3
    python benchmarks/quality.py --methods ctpd,random --settings ctpd=0.1:0.001      # nothing is chosen
    python benchmarks/quality.py --report                            # the tables and figures of what is there
    python benchmarks/quality.py --one "world=seed0-noise0.2-word-teacher1,method=ctpd,beta=0.1,lr=0.001"

Every method trains the same student on the same pairs with as many updates of as many pairs. Its one knob and its
learning rate are chosen on worlds of their own (other seeds: other pairs, noise and models) by the true reward of
sampled answers; an ablation takes those of what it is an ablation of. Then come the worlds of the tables, where a seed
changes pairs, label noise, the models' first weights and the order of training. Methods are compared on the same
worlds, so differences are paired.

DIR/cells.jsonl gets a line for each cell, and a cell that is there is not run again: kill the command at any moment and
repeat it. DIR/tables.md and DIR/*.svg are what docs/evidence.md shows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from quality_cells import Cell, Method, Sizes, World, alone, lines_of, made_from, run_world
from quality_report import fluent_table, frontier, report

from ctpd_jax.errors import UserError

LRS = (1e-3, 2e-3)
STUDENT = {"weights.positive_scorer": "student", "weights.negative_scorer": "student"}

PI_PLUS = "positive"  # logit distillation learns from the teacher after DPO, the one that knows the preferences

# A new method is a line. `knobs` are the values of its one knob that are tried, beside LRS.
METHODS = {
    # What is not trained here: rows of the table.
    "sft": Method("student after SFT", stage="student_sft", knobs=()),
    "teacher": Method("teacher after SFT", stage="teacher_sft", knobs=()),
    "teacher_dpo": Method("teacher after DPO", stage="positive", knobs=()),
    # The methods.
    "dpo": Method("DPO of the student", stage="student_dpo"),
    "ctpd": Method("CTPD, the paper's"),
    "ctpd_start": Method("CTPD, the student's start as reference", {"train.reference": "student"}, like="ctpd"),
    # Ours. The regression's loss is small against the SFT term, which gets a tenth of the weight.
    "regression": Method(
        "span regression",
        {"train.objective": "regression", "train.sft_weight": 0.2},
        knob="tau",
        knobs=(4.0, 8.0, 16.0),
    ),
    "contrast": Method(
        "span regression on the contrastive pair",
        {"train.objective": "regression", "train.contrast": "negative", "train.sft_weight": 0.2},
        knob="tau",
        knobs=(2.0, 4.0, 8.0),
    ),
    "contrast_sft": Method(
        "the same, held closer to the chosen responses",
        {"train.objective": "regression", "train.contrast": "negative", "train.sft_weight": 1.0},
        knob="tau",
        knobs=(4.0, 8.0, 16.0),
    ),
    "mixed": Method(
        "weights, start as reference, and that regression",
        {"train.objective": "mixed", "train.contrast": "negative", "train.tau": 3.0},
    ),
    # Others', from the same start.
    "tis": Method(
        "TIS-DPO, the student's own pair", stage="student_tis", needs=("student_dpo", "student_reverse"), like="dpo"
    ),
    "uld": Method("ULD", {"student_uld.teacher": PI_PLUS}, "student_uld", "weight", (0.5, 2.0, 8.0)),
    "ot": Method("Multi-Level OT", {"student_ot.teacher": PI_PLUS}, "student_ot", "weight", (0.15, 0.6, 2.4)),
    "dskd": Method("DSKD", {"student_dskd.teacher": PI_PLUS}, "student_dskd", "weight", (0.3, 1.0, 3.0)),
    # Ablations of CTPD: weights, reference, span log-probability, normalisation.
    "uniform": Method("weights of one", {"weights.source": "uniform"}, like="ctpd"),
    "random": Method("random weights", {"weights.source": "random"}, like="ctpd"),
    "student_weights": Method("weights scored by the student", prepare=STUDENT, like="ctpd"),
    "mixed_weights": Method(
        "pi+ of the teacher, pi- of the student", prepare={"weights.negative_scorer": "student"}, like="ctpd"
    ),
    "sft_weights": Method("pi+, pi- by SFT on chosen, on rejected", prepare={"weights.source": "sft"}, like="ctpd"),
    "threshold": Method("weights clipped", {"weights.transform": "threshold"}, like="ctpd"),
    "scale": Method("weights scaled", {"weights.transform": "scale"}, like="ctpd"),
    "rank": Method("weights by rank", {"weights.transform": "rank"}, like="ctpd"),
    "binary": Method("weights 0 or 1", {"weights.transform": "binary"}, like="ctpd"),
    "mu0": Method("mu = 0", {"weights.mu": 0.0}, like="ctpd"),
    "no_reference": Method("no reference", {"train.reference": "none"}, like="ctpd"),
    "span_mean": Method("mean over a span's tokens", {"train.span_logprob": "mean"}),
    "per_span": Method("reward per span", {"train.normalize": "span"}, knobs=(3.0, 10.0, 30.0)),
    "per_byte": Method("reward per byte", {"train.normalize": "byte"}, knobs=(10.0, 30.0, 100.0)),
}
ROWS = ("sft", "teacher", "teacher_dpo")
MAIN = ("dpo", "tis", "uld", "ot", "dskd", "ctpd", "ctpd_start", "regression", "contrast", "contrast_sft", "mixed")
ABLATIONS = tuple(name for name in METHODS if name not in (*ROWS, *MAIN))
# Measured in all worlds, the others in the nominal one.
CURVES = ("dpo", "ctpd", "ctpd_start", "regression", "contrast")

FLUENT = 1.02  # bits per byte relative to CTPD's that count as equal fluency
CHOOSING_SEEDS = (100, 101)  # of the worlds on which settings are chosen
WORLDS = {
    "nominal": (World(),),
    "noise": tuple(World(noise=noise) for noise in (0.0, 0.1, 0.2, 0.3)),
    "mismatch": tuple(World(mismatch=mismatch) for mismatch in ("near", "word", "unigram")),
    "teacher": tuple(World(teacher=teacher) for teacher in (0.25, 1.0, 2.0)),
}


Settings = Mapping[str, tuple[float, float]]  # method -> its knob and learning rate

# ------------------------------------------------------------------------------------------------ which cells


def choosing_cells(names: Sequence[str], given: Settings) -> list[Cell]:
    """The grid of every method whose settings are not given, on the worlds where they are chosen."""
    cells = []
    own = dict.fromkeys(METHODS[name].like or name for name in names)
    for name, seed in product([name for name in own if name not in given], CHOOSING_SEEDS):
        for knob, lr in product(METHODS[name].knobs, LRS):
            cells.append(Cell(replace(World(), seed=seed), name, knob, lr, seed))
    return cells


def tried_settings(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float, float], tuple[float, float]]:
    """(method, knob, lr) -> mean bits per byte and true reward over the worlds where settings are chosen."""
    grid = {World(seed=seed).name for seed in CHOOSING_SEEDS}
    found: dict[tuple[str, float, float], dict[str, tuple[float, float]]] = {}
    for line in lines:
        key = line["key"]
        if key["world"] in grid:
            lost = {"bits_per_byte": float("inf"), "reward": float("-inf")}  # a training that diverged
            bits, reward = ((lost | line["found"])[name] for name in lost)
            found.setdefault((key["method"], key["knob"], key["lr"]), {})[key["world"]] = bits, reward
    return {setting: tuple(np.mean(list(own.values()), axis=0).tolist()) for setting, own in found.items()}


def chosen_settings(
    lines: Sequence[Mapping[str, Any]], names: Sequence[str], given: Settings, as_fluent: bool = False
) -> dict[str, tuple[float, float]]:
    """Each method's knob and learning rate: given, or the best true reward over the worlds where settings are chosen.

    With `as_fluent`, among those settings that cost no more bits per byte than CTPD's do.
    """
    tried = tried_settings(lines)
    most = float("inf")
    if as_fluent:
        if not (base := chosen_settings(lines, ["ctpd"], {})):
            return {}
        most = FLUENT * tried["ctpd", *base["ctpd"]][0]
    found = {name: (0.0, 0.0) for name in names if not METHODS[name].knobs}
    for name in names:
        chooser = METHODS[name].like or name
        own = {each[1:]: reward for each, (bits, reward) in tried.items() if each[0] == chooser and bits <= most}
        if chooser in given:
            found[name] = given[chooser]
        elif own:
            found[name] = max(own, key=lambda setting: own[setting])
    return found


def table_cells(worlds: Sequence[str], names: Sequence[str], seeds: int, settings: Settings) -> list[Cell]:
    """The cells of the tables, at the chosen settings."""
    cells: dict[Cell, None] = {}
    for kind in worlds:
        for world, seed in product(WORLDS[kind], range(seeds)):
            for name in names:
                if world == World() or name in (*ROWS, *CURVES):
                    cells[Cell(replace(world, seed=seed), name, *settings[name], seed)] = None
    return list(cells)


def lines_here(folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """The lines that were made from what the methods and sizes are now."""
    lines = [line for line in lines_of(folder / "cells.jsonl") if line["key"]["method"] in METHODS]
    return [line for line in lines if line["made_from"] == made_from(METHODS[line["key"]["method"]], sizes)]


def run_missing(folder: Path, sizes: Sizes, cells: Sequence[Cell], jobs: int) -> None:
    """Runs the cells that have no line yet, world by world, several worlds at once."""
    there = [line["key"] for line in lines_here(folder, sizes)]
    worlds: dict[World, list[Cell]] = {}
    for cell in cells:
        if cell.key not in there:
            worlds.setdefault(cell.world, []).append(cell)
    missing = sum(map(len, worlds.values()))
    print(f"{len(cells) - missing} of {len(cells)} cells are there; {missing} to run.", flush=True)
    if not worlds:
        return
    # A process ends after some worlds, and with it what it has compiled.
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=begin_worker, initargs=(folder,), maxtasksperchild=4) as pool:
        work = [pool.apply_async(run_world, (folder, sizes, METHODS, own)) for own in worlds.values()]
        for number, each in enumerate(work, 1):
            each.get()
            print(f"{number} of {len(work)} worlds", flush=True)


def begin_worker(folder: Path) -> None:
    """Prepares a worker: what stages say goes to DIR/log.txt, and it ends with the process that began it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # else it would write into a world that the repeated command is at work in

    Thread(target=watch, daemon=True).start()
    sys.stderr = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115 (as long as the process)
    alone(folder)


def run_one(folder: Path, sizes: Sizes, text: str) -> None:
    """Runs one cell again and prints its numbers, beside those of its line if there is one."""
    # 1. What is asked for; what is left out is as it was chosen.
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    (name,) = named_methods(parts.get("method", "ctpd"))
    allowed = {"world", "method", METHODS[name].knob, "lr", "seed"}
    if unknown := set(parts) - allowed:
        raise UserError(f"--one does not know {', '.join(sorted(unknown))}; it takes {', '.join(sorted(allowed))}.")
    world = World.named(parts.get("world", World().name))
    lines = lines_here(folder, sizes)
    knob, lr = chosen_settings(lines, [name], {}).get(name, ((*METHODS[name].knobs, 0.0)[0], LRS[0]))
    knob, lr = float(parts.get(METHODS[name].knob, knob)), float(parts.get("lr", lr))
    cell = Cell(world, name, knob, lr, int(parts.get("seed", world.seed)))
    # 2. The line of before stays, and if there is none, this run leaves it.
    alone(folder)
    before = [line["found"] for line in lines if line["key"] == cell.key]
    (found,) = run_world(folder, sizes, METHODS, [cell])
    # 3. Seconds differ, nothing else.
    for name, value in found.items():
        told = f"   before: {before[-1].get(name)}" if before else ""
        print(f"{name:24} {value}{told}")
    if before:
        numbers = [{k: v for k, v in each.items() if not k.endswith("seconds")} for each in (found, before[-1])]
        print("the same numbers" if numbers[0] == numbers[1] else "OTHER NUMBERS than before")


def named_methods(text: str) -> list[str]:
    names = [*ROWS, *MAIN, *ABLATIONS] if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"There is no method {unknown[0]!r}; choose among {', '.join(METHODS)}.")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=methods_text()
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/quality"), help="where everything lies")
    parser.add_argument("--methods", default="all", help="names with commas; see below (default: all)")
    parser.add_argument("--worlds", default=",".join(WORLDS), help=f"among {','.join(WORLDS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="worlds of each kind (default: 5)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument("--sizes", default="", help=f"NAME=VALUE,... among {asdict(Sizes())}")
    parser.add_argument("--settings", default="", help="METHOD=KNOB:LR,...: these are not chosen")
    parser.add_argument("--one", metavar="WHICH", help="run one cell again: world=...,method=...,beta=...,lr=...")
    parser.add_argument("--report", action="store_true", help="run nothing; tables and figures of what is there")
    known = parser.parse_args()
    try:
        sizes = Sizes.of(known.sizes)
        names, worlds = named_methods(known.methods), known.worlds.split(",")
        if unknown := [kind for kind in worlds if kind not in WORLDS]:
            raise UserError(f"There are no worlds {unknown[0]!r}; choose among {', '.join(WORLDS)}.")
        known.dir.mkdir(parents=True, exist_ok=True)
        if known.one:
            run_one(known.dir, sizes, known.one)
            return 0
        given = given_settings(known.settings)
        if not known.report:
            run_missing(known.dir, sizes, choosing_cells(names, given), known.jobs)
            lines = lines_here(known.dir, sizes)
            cells = table_cells(worlds, names, known.seeds, chosen_settings(lines, names, given))
            fluent = chosen_settings(lines, [name for name in names if name in MAIN], {}, as_fluent=True)
            cells += table_cells(["nominal"], list(fluent), known.seeds, fluent)
            run_missing(known.dir, sizes, list(dict.fromkeys(cells)), known.jobs)
        print(tables(known.dir, sizes, given))
    except UserError as error:
        print(f"quality.py: {error}", file=sys.stderr)
        return 2
    return 0


def given_settings(text: str) -> dict[str, tuple[float, float]]:
    """Read "ctpd=0.1:0.001,dpo=0.3:0.002". Raises UserError for what is not of that form."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, values = part.partition("=")
        try:
            knob, lr = map(float, values.split(":"))
        except ValueError:
            raise UserError(f"--settings takes METHOD=KNOB:LR with commas, not {part!r}.") from None
        found[named_methods(name)[0]] = knob, lr
    return found


def tables(folder: Path, sizes: Sizes, given: Settings) -> str:
    """The tables and figures of the cells that are there, at the settings that are chosen now."""
    lines = lines_here(folder, sizes)
    settings, fluent = chosen_settings(lines, list(METHODS), given), chosen_settings(lines, MAIN, {}, as_fluent=True)
    says = {name: method.says for name, method in METHODS.items()}
    # What varies within a kind of worlds is the field of that name; the nominal one has none.
    kinds = {kind: {world.name: str(getattr(world, kind, kind)) for world in own} for kind, own in WORLDS.items()}
    text = report(folder, results_of(lines, settings), settings, says, kinds)
    if at_ctpd := results_of(lines, fluent):
        text += "\n" + fluent_table(at_ctpd, World().name, fluent, says)
    points = {name: [] for name in (*MAIN, "sft")}
    for (name, *_), point in tried_settings(lines).items():
        if name in points:
            points[name].append(point)
    if any(points.values()):
        (folder / "frontier.svg").write_text(frontier(points), encoding="utf-8")
    (folder / "tables.md").write_text(text, encoding="utf-8")
    return text


def results_of(
    lines: Sequence[Mapping[str, Any]], settings: Settings
) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """(world without its seed, method) -> seed -> what was found at these settings."""
    results: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for line in lines:
        key = line["key"]
        world = World.named(key["world"])
        if settings.get(key["method"]) != (key["knob"], key["lr"]) or "failed" in line["found"]:
            continue
        if world.seed not in CHOOSING_SEEDS and key["seed"] == world.seed:
            found = results.setdefault((replace(world, seed=0).name, key["method"]), {})
            found[world.seed] = line["found"]
    return results


def methods_text() -> str:
    return "methods:\n" + "\n".join(f"  {name:16} {method.says}" for name, method in METHODS.items())


if __name__ == "__main__":
    sys.exit(main())
