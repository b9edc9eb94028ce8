"""Every method on two real models and real pairs: which student is the best, and by how much?

    python benchmarks/real_pair.py --data PAIRS --teacher GEMMA_3_270M --student SMOLLM2_135M_INSTRUCT --dir runs/pair
    python benchmarks/real_pair.py --dir runs/pair --report                  # the tables of what is there

PAIRS holds train.jsonl and test.jsonl (prompt, chosen, rejected; instructions of one file are not in the other). Only
short pairs are taken, so that responses are read whole and two cores can train on them. Every instruction that has a
length-matched short pair goes to the held-out side, where they are rare: training then sees pairs of which the longer
response nearly always is the chosen one, and the held-out ones tell who has learnt no more than that.

The teacher's stages are made once. Every method starts from the same student, with the same store, as many updates and
the same learning rate; a seed changes the order of training and the random weights. DIR/cells.jsonl gets a line for
each, and what is there is not run again: kill the command at any moment and repeat it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from quality_cells import Method, append, lines_of, remove, run_stage
from quality_measures import lambda_at_start, share
from quality_report import interval, spread, table

from ctpd_jax.annotate.store import open_store
from ctpd_jax.evaluate.accuracy import accuracy, difference, length_matched
from ctpd_jax.job.check import check_config
from ctpd_jax.job.job import Job, open_job
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.score import score
from ctpd_jax.schema import CHOSEN, REJECTED
from ctpd_jax.settings import default_config

SHORT = 800  # characters of either response
PROMPT = 400  # characters
LONG_PAIRS = 10  # held-out pairs of longer responses, cut at the limit: text like no training pair, to see damage
TOLERANCE = 0.2  # of the length-matched pairs: lengths differ by at most this share
BETA = 0.1
OURS = {"train.objective": "regression", "train.contrast": "negative", "train.tau": 2.0}

METHODS = {
    "sft": Method("SFT on the chosen responses", stage="student_sft"),
    "dpo": Method("DPO of the student", stage="student_dpo"),
    "tis": Method("TIS-DPO, the student's own pair", stage="student_tis", needs=("student_dpo", "student_reverse")),
    "ctpd": Method("CTPD, the paper's"),
    "ctpd_start": Method("CTPD, the student's start as reference", {"train.reference": "student"}),
    "uniform": Method("CTPD, weights of one", {"weights.source": "uniform"}),
    "random": Method("CTPD, random weights", {"weights.source": "random"}),
    "contrast": Method("span regression on the contrastive pair", OURS),
    "mixed": Method(
        "weights, start as reference, and that regression",
        {**OURS, "train.objective": "mixed"},
    ),
}


def pairs_on_disk(data: Path, folder: Path) -> tuple[str, str]:
    """Writes DIR/train.jsonl and DIR/test.jsonl and returns their paths."""

    def rows(name: str) -> list[dict[str, str]]:
        with open(data / name, encoding="utf-8") as file:
            return [row for row in map(json.loads, file) if len(row["prompt"]) <= PROMPT]

    def lengths(row: Mapping[str, str]) -> list[int]:
        return [len(row[side].encode()) for side in ("chosen", "rejected")]

    def short(row: Mapping[str, str]) -> bool:
        return max(len(row["chosen"]), len(row["rejected"])) <= SHORT

    train, test = rows("train.jsonl"), rows("test.jsonl")
    matched = [row for row in train if short(row) and length_matched(np.array([lengths(row)]), TOLERANCE)[0]]
    held = {row["prompt"] for row in matched}
    chosen = {
        "train": [row for row in train if short(row) and row["prompt"] not in held],
        "test": [row for row in test if short(row)]
        + matched
        + [row for row in test if min(len(row["chosen"]), len(row["rejected"])) > SHORT][:LONG_PAIRS],
    }
    paths = []
    for name, own in chosen.items():
        paths.append(folder / f"{name}.jsonl")
        text = "".join(json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")}) + "\n" for row in own)
        paths[-1].write_text(text, encoding="utf-8")
    return str(paths[0]), str(paths[1])


def base_config(arguments: argparse.Namespace) -> ConfigDict:
    """The config of the teacher's stages."""
    config = default_config()
    config.teacher.path, config.student.path = str(arguments.teacher), str(arguments.student)
    config.data.train, config.data.test = pairs_on_disk(arguments.data, arguments.dir)
    config.data.update({"max_prompt_tokens": 128, "max_response_tokens": 256, "limit": 4 * arguments.updates})
    config.rows.fewer, config.rows.buckets = "no", 4  # the passes that the tables were made with
    config.annotate.micro_batch = 2
    config.evaluate.length_tolerance = TOLERANCE
    config.teacher_sft.update({"lr": 1e-5, "steps": arguments.updates // 2, "batch_size": 4, "micro_batch": 2})
    for stage in ("positive", "negative", "train", "student_dpo", "student_reverse", "student_tis"):
        config[stage].update({"steps": arguments.updates, "batch_size": 4, "micro_batch": 1, "save_every": 20})
    for stage in ("train", "student_dpo", "student_reverse", "student_tis"):
        config[stage].update({"lr": 1e-5, "beta": BETA})
    # Gentler than what the student gets; at 5e-6 there was little to teach.
    for stage in ("positive", "negative"):
        config[stage].update({"lr": 8e-6, "beta": 0.3})
    for stage in ("student_dpo", "student_reverse", "student_tis"):
        config[stage].steps = -1  # until a method asks for them
    return config


def run_method(
    job: Job, base: ConfigDict, method: Method, seed: int, updates: int, teachers: np.ndarray
) -> dict[str, Any]:
    """Trains a student and returns what is measured of it; `teachers` are the teacher's margins."""
    began, config = time.perf_counter(), job.config
    before = log_probabilities(job, "student_sft")
    # 1. What the methods differ in.
    config.update(base)
    config.seed = seed
    config.update_from_flattened_dict(method.settings)
    for stage in (*method.needs, method.stage):
        config[stage].steps = updates
    if method.stage == "student_sft":
        config.student_sft.update({"lr": 1e-5, "batch_size": 4, "micro_batch": 2})
    check_config(config)
    # 2. The stages; a student_dpo of this seed is taken over, what a killed command left may be another method's.
    if method.stage != "student_dpo":
        shutil.rmtree(job.workdir / method.stage, ignore_errors=True)
    for stage in (*method.needs, method.stage):
        run_stage(job, stage)
    trained = time.perf_counter()
    found = {"train_seconds": round(trained - began, 1)} | figures_of(job, method.stage)
    found |= of_held_out(job, before, log_probabilities(job, method.stage), teachers)
    if method.stage == "train" and config.train.objective != "regression":  # which has no lambda
        store = open_store(job.workdir / "annotations", verify=False)
        found |= lambda_at_start(list(store), config)
    # 3. Room for the next one.
    if method.stage != "student_dpo":
        remove(job, method)
    config.update(base)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def figures_of(job: Job, stage: str) -> dict[str, float]:
    """The last ten updates' means of what training itself said."""
    lines = lines_of(job.workdir / "metrics.jsonl")
    own = [line for line in lines if line.get("stage") == stage][-10:]
    names = [name for name in ("loss", "rewards/accuracies", "rewards/margins") if own and name in own[-1]]
    return {f"train_{name.split('/')[-1]}": float(np.mean([line[name] for line in own])) for name in names}


def log_probabilities(job: Job, stage: str) -> np.ndarray:
    """Return the log-probabilities of the held-out responses, float64 [N, 2]."""
    pairs = load_pairs(job, "test")
    column = score(job, pairs, {stage: stage}, "float32")[stage]
    return np.array([[scores.sum(dtype=np.float64) for scores in both] for both in column])


def teachers_margins(job: Job) -> np.ndarray:
    """Return what the contrastive pair says of the held-out pairs, log pi+ - log pi- of chosen less rejected: [N]."""
    return difference(log_probabilities(job, "positive") - log_probabilities(job, "negative"))


def of_held_out(job: Job, before: np.ndarray, own: np.ndarray, teachers: np.ndarray) -> dict[str, float]:
    """Accuracies, agreement, loss and fluency on the held-out pairs, every token counting one; all methods alike."""
    pairs, raw = load_pairs(job, "test").aligned, load_pairs(job, "test").raw
    covered = np.array([[pair.response(side).bounds[-1] for side in (CHOSEN, REJECTED)] for pair in pairs])
    lengths = np.array([[pair.chosen_bytes, pair.rejected_bytes] for pair in pairs])
    short = np.array([max(len(raw[pair.id].chosen), len(raw[pair.id].rejected)) <= SHORT for pair in pairs])
    matched = short & length_matched(lengths, TOLERANCE)
    margins, bits = difference(own - before), -own / covered / np.log(2)
    longer = difference(lengths.astype(float))
    found = {
        "pairs": int(short.sum()),
        "pairs_matched": int(matched.sum()),
        "longer_is_chosen": share(longer[short]),
        "longer_is_chosen_matched": share(longer[matched]),
        "accuracy": share(margins[short]),
        "accuracy_matched": share(margins[matched]),
        "accuracy_per_byte": share(difference(own / covered)[short]),
        "accuracy_per_byte_matched": share(difference(own / covered)[matched]),
        # What was distilled is the teacher's preference, whether the label says so or not.
        "follows": correlation(margins[short], teachers[short]),
        "follows_matched": correlation(margins[matched], teachers[matched]),
        "margin": float(margins[short].mean()),
        "margin_matched": float(margins[matched].mean()),
        "loss": float(np.logaddexp(0, -BETA * margins[short]).mean()),
        "loss_matched": float(np.logaddexp(0, -BETA * margins[matched]).mean()),
        "bits_chosen": float(bits[short, CHOSEN].mean()),
        "bits_rejected": float(bits[short, REJECTED].mean()),
        "bits_other": float(bits[~short].mean()),
    }
    interval_of = accuracy(margins[matched])
    return found | {"accuracy_matched_low": interval_of.low, "accuracy_matched_high": interval_of.high}


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation, 0 where one of them does not vary: a model against itself has no margins."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0


def run(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    arguments.dir.mkdir(parents=True, exist_ok=True)
    config = base_config(arguments)
    check_config(config)
    with open_job(config, arguments.dir, say=lambda text: print(text, file=sys.stderr)) as job:
        # 1. The teacher's stages, each once.
        for stage in ("teacher_sft", "positive", "negative", "annotate"):
            run_stage(job, stage)
        base, teachers = job.config.copy_and_resolve_references(), teachers_margins(job)
        cells = arguments.dir / "cells.jsonl"

        def there(**key: Any) -> bool:
            return any(line["key"] == key for line in lines_of(cells))

        # 2. The rows that nothing is trained for.
        for name, stage in {"before": "student_sft", "teacher": "teacher_sft", "teacher_dpo": "positive"}.items():
            if not there(method=name, seed=0):
                start = log_probabilities(job, "teacher_sft" if name == "teacher_dpo" else stage)
                found = of_held_out(job, start, log_probabilities(job, stage), teachers)
                append(cells, {"key": {"method": name, "seed": 0}, "found": found})
        # 3. Every method, seed by seed.
        for seed in range(arguments.seeds):
            for name in names:
                if not there(method=name, seed=seed):
                    found = run_method(job, base, METHODS[name], seed, arguments.updates, teachers)
                    append(cells, {"key": {"method": name, "seed": seed}, "found": found})
                    print(name, seed, json.dumps(found), flush=True)
            for name in ("dpo", "tis"):
                remove(job, METHODS[name])


def report(folder: Path) -> str:
    """The table of what is there: means over the seeds."""
    by_method: dict[str, list[dict[str, float]]] = {}
    for line in lines_of(folder / "cells.jsonl"):
        by_method.setdefault(line["key"]["method"], []).append(line["found"])
    columns = {
        "accuracy_matched": ("length-matched, %", 1),
        "accuracy": ("all short, %", 1),
        "follows_matched": ("follows the teacher, matched", 2),
        "follows": ("all short", 2),
        "margin_matched": ("margin, matched", 2),
        "loss_matched": ("loss, matched", 3),
        "loss": ("loss", 3),
        "bits_chosen": ("bits per byte, chosen", 3),
        "bits_rejected": ("rejected", 3),
        "bits_other": ("other text", 3),
        "lambda_below_0.05": ("λ < 0.05 at start, %", 0),
        "lambda_above_0.95": ("λ > 0.95 at start, %", 0),
    }
    rows = []
    for name, found in by_method.items():
        cells = [f"`{name}`", METHODS[name].says if name in METHODS else "", str(len(found))]
        for measure, (heading, digits) in columns.items():
            values = [one[measure] for one in found if measure in one]
            mean = interval(values)[0] if values else float("nan")
            cells.append("" if np.isnan(mean) else spread([mean], digits, "%" in heading))
        rows.append(cells)
    return table(["method", "", "seeds", *(heading for heading, _ in columns.values())], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("pairs"), help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--teacher", type=Path, default="google/gemma-3-270m")
    parser.add_argument("--student", type=Path, default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dir", type=Path, default=Path("runs/real_pair"), help="where everything lies")
    parser.add_argument(
        "--updates", type=int, default=46, help="of 4 pairs, for every method (default: 46, all pairs once)"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas (default: all)")
    parser.add_argument("--report", action="store_true", help="run nothing; the table of what is there")
    arguments = parser.parse_args()
    if not arguments.report:
        jax.config.update("jax_compilation_cache_dir", str(arguments.dir.absolute() / "compile_cache"))
        run(arguments, arguments.methods.split(","))
    print(report(arguments.dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
