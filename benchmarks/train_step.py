"""How fast CTPD trains, against the same update in PyTorch: on the same pairs, machine and cores, in float32.

    python benchmarks/train_step.py --data PAIRS --teacher GEMMA_3_270M --student SMOLLM2_135M_INSTRUCT --json step.json
    python benchmarks/train_step.py ... --also "student.remat=dots" --also "student.remat=dots train.micro_batch=1"
    python benchmarks/train_step.py ... --epoch 64                 # annotation, all updates, and what is written

PAIRS is a folder with train.jsonl or a .jsonl file, of prompt, chosen and rejected. Ours runs with the default
settings, and besides with those of every --also. torch (torch_ctpd.py, in the environment that the tests make for it,
tests/helpers/real_assets.py) runs once with the teacher in every step, as the method's public code does, and once with
the reference's log-probabilities computed before; each with the fastest of its micro-batches.

Each side is a process of its own that waits until it is asked, A B A B; only one computes at a time. Weights of spans
are made up, the reference's numbers are the teacher's. All sides must have the same loss in their first update.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from timing import ROUNDS, alternate, matmul_gflops, medians, write

HERE = Path(__file__).resolve().parent
POOL = 64  # pairs of the stage that the shapes of batches are chosen for; an update takes some of them
MICRO_BATCHES = (1, 2, 4)  # that torch tries
SAME = 1e-3  # relative, of the losses of the first update
OURS, TEACHER, BEFORE = "ours, default settings", "torch, teacher in every step", "torch, reference from before"


class Side:
    """A process that answers a line by a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.process.args} ended with exit code {self.process.wait()}; its errors stand above.")
        return json.loads(line)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def torch_side(file: Path) -> Side:
    sys.path.insert(0, str(HERE.parent / "tests"))
    from helpers import real_assets

    return Side(real_assets.start_in_assets_venv(HERE / "torch_ctpd.py", file))


class Ours:
    """Starts processes of our side, all with the same pairs."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.given = {
            "teacher": str(arguments.teacher),
            "student": str(arguments.student),
            "data": str(pairs_on_disk(arguments, folder)),
            "batch_size": arguments.pairs,
        }

    def start(self, settings: Mapping[str, Any], workdir: str = "step") -> Side:
        self.started += 1
        file = self.folder / f"given{self.started}.json"
        given = {**self.given, "settings": dict(settings), "workdir": str(self.folder / workdir)}
        given["looks_only"] = workdir == "step"  # several processes share what the first one has measured
        file.write_text(json.dumps(given), encoding="utf-8")
        # What one process has compiled the next one finds, as when a command is given again.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled")}
        command = [sys.executable, str(HERE / "jax_ctpd.py"), str(file)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return Side(subprocess.Popen(command, env=environment, **pipes))


def pairs_on_disk(arguments: argparse.Namespace, folder: Path) -> Path:
    """Writes the first pairs, both responses cut."""
    source, path = arguments.data, folder / "pairs.jsonl"
    count = arguments.epoch or max(POOL, arguments.pairs)
    with open(source / "train.jsonl" if source.is_dir() else source, encoding="utf-8") as file, open(path, "w") as out:
        for _, line in zip(range(count), file):
            row = json.loads(line)
            short = {side: row[side][: arguments.characters] for side in ("chosen", "rejected")}
            out.write(json.dumps({"prompt": row["prompt"], **short}) + "\n")
    return path


def settings_of(text: str) -> dict[str, Any]:
    """ "student.remat=dots train.micro_batch=1" -> their values; what is no JSON is a word."""
    settings = {}
    for part in text.split():
        name, _, value = part.partition("=")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


# ------------------------------------------------------------------------------------------------ measuring


Replies = dict[str, list[dict[str, Any]]]  # of every side, the first one with compiling


def measured(sides: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> tuple[dict[str, list[float]], Replies]:
    replies: Replies = {name: [] for name in sides}

    def run(name: str) -> None:
        replies[name].append(sides[name]())
        print(f"{name}: {replies[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)

    return alternate({name: lambda name=name: run(name) for name in sides}, rounds), replies


def fastest_micro_batches(file: Path, kinds: Mapping[str, bool], pairs: int) -> dict[str, int]:
    """Which micro-batch torch is fastest with, in a process that ends: its memory is not that of the measurement."""
    side, tried = torch_side(file), [size for size in MICRO_BATCHES if size <= pairs]
    asks = {
        f"{kind}, micro-batch {size}": {"run": "update", "teacher": teacher, "micro_batch": size}
        for kind, teacher in kinds.items()
        for size in tried
    }
    seconds, _ = measured({name: lambda ask=ask: side.ask(**ask) for name, ask in asks.items()}, 1)
    side.end()
    return {kind: min(tried, key=lambda size: seconds[f"{kind}, micro-batch {size}"][0]) for kind in kinds}


def steps(arguments: argparse.Namespace, ours: Ours, file: Path, best: Mapping[str, int]) -> tuple[dict, Replies]:
    """An update of every side, A B A B."""
    processes = {OURS: ours.start({})}
    processes |= {f"ours, {also}": ours.start(settings_of(also)) for also in arguments.also}
    asks: dict[str, dict[str, Any]] = {name: {"run": "update"} for name in processes}
    for kind, teacher in ((TEACHER, True), (BEFORE, False)):
        processes[kind] = torch_side(file)
        asks[kind] = {"run": "update", "teacher": teacher, "micro_batch": best[kind]}
    runs = {name: lambda name=name: processes[name].ask(**asks[name]) for name in processes}
    found = measured(runs, arguments.rounds)
    for process in processes.values():
        process.end()
    return found


def epochs(arguments: argparse.Namespace, ours: Ours, file: Path, best: Mapping[str, int]) -> tuple[dict, Replies]:
    """A whole epoch of every side, each in a fresh process, whose start counts too."""

    def ask(start: Callable[[], Side], **what: Any) -> dict[str, Any]:
        began = time.perf_counter()
        side = start()
        answer = side.ask(**what)
        side.end()
        return answer | {"seconds": time.perf_counter() - began}

    def own(settings: Mapping[str, Any]) -> dict[str, Any]:
        return ask(lambda: ours.start(settings, f"epoch{ours.started}"), run="epoch")

    runs = {OURS: lambda: own({})}
    runs |= {f"ours, {also}": lambda also=also: own(settings_of(also)) for also in arguments.also}
    runs[TEACHER] = lambda: ask(lambda: torch_side(file), run="epoch", micro_batch=best[TEACHER])
    return measured(runs, arguments.rounds)


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    # 1. The same pairs for all, and what torch is fastest with.
    ours, step, whole = Ours(arguments, folder), folder / "step.json", folder / "epoch.json"
    side = ours.start({})
    work = side.ask(run="prepare", to=str(step), epoch=False)
    if arguments.epoch:
        work = side.ask(run="prepare", to=str(whole), epoch=True)
    side.end()
    work = {name: work[name] for name in ("pairs", "tokens", "scored", "useful_gflop")}
    kinds = {TEACHER: True} if arguments.epoch else {TEACHER: True, BEFORE: False}
    best = fastest_micro_batches(step, kinds, arguments.pairs)

    # 2. What is measured, and the machine before and after it.
    before = matmul_gflops()
    seconds, replies = epochs(arguments, ours, whole, best) if arguments.epoch else steps(arguments, ours, step, best)
    gflops = [before, matmul_gflops()]

    # 3. Figures.
    sides, middle = {}, medians(seconds)
    for name, answers in replies.items():
        rate = work["useful_gflop"] / middle[name]
        sides[name] = {
            "seconds": middle[name],
            "all_seconds": seconds[name],
            "first_seconds": answers[0]["seconds"],
            "pairs_per_second": work["pairs"] / middle[name],
            "peak_gb": max(answer["peak_gb"] for answer in answers),
            "padding": answers[0]["padding"],
            "loss": answers[0]["loss"],
            "of_matmul_rate": rate / median(gflops),
            **({"micro_batch": best[name], "versions": answers[0]["versions"]} if name in best else {}),
            **{part: median(a[part] for a in answers[1:]) for part in ("annotation", "training") if part in answers[0]},
        }
    losses = [side["loss"] for side in sides.values()]
    apart = max(abs(loss / losses[0] - 1) for loss in losses)
    return {"characters": arguments.characters, **work, "matmul_gflops": gflops, "losses_apart": apart, "sides": sides}


def table(result: Mapping[str, Any]) -> str:
    sides, width = result["sides"], max(map(len, result["sides"])) + 16
    first = sides[OURS]["seconds"]
    lines = [
        f"{result['pairs']} pairs, {result['tokens']:,} tokens of the student, {result['scored']:,} of them scored, "
        f"{result['useful_gflop']:,.0f} useful GFLOP; matmul rate "
        + " and ".join(f"{rate:.0f}" for rate in result["matmul_gflops"])
        + " GFLOP/s",
        f"{'':{width}} seconds  pairs/s  peak GB  padding  of matmul rate  times ours  first run      loss",
    ]
    for name, side in sides.items():
        label = name + (f", micro-batch {side['micro_batch']}" if "micro_batch" in side else "")
        lines.append(
            f"{label:{width}} {side['seconds']:7.2f} {side['pairs_per_second']:8.3f} {side['peak_gb']:8.2f} "
            f"{side['padding']:8.1%} {side['of_matmul_rate']:15.1%} {side['seconds'] / first:11.2f} "
            f"{side['first_seconds']:8.2f} s {side['loss']:9.5f}"
        )
        if "annotation" in side:
            lines[-1] += f"   annotation {side['annotation']:.1f} s, training {side['training']:.1f} s"
    same = "the same" if result["losses_apart"] < SAME else "NOT THE SAME"
    lines.append(f"Losses of the first update: {result['losses_apart']:.1e} apart, {same} to {SAME:g}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="PAIRS")
    parser.add_argument("--teacher", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--student", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--pairs", type=int, default=4, help="of an update")
    parser.add_argument("--characters", type=int, default=1200, help="of a response, at most")
    parser.add_argument("--also", action="append", default=[], metavar="KEY=VALUE ...", help="settings of ours to try")
    parser.add_argument("--epoch", type=int, default=0, metavar="N_PAIRS", help="a whole epoch rather than an update")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, and 1 for an epoch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.epoch and arguments.epoch < arguments.pairs:
        parser.error("an epoch has at least the pairs of one update")
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.epoch else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
    print(table(result))
    write(arguments.json, "train_step", **result)
    if result["losses_apart"] >= SAME:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
