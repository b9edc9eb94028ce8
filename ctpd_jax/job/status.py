"""How far a run has come, read from its workdir alone: from another machine too, while the run goes on."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ml_collections import ConfigDict

from ctpd_jax.artifacts import read_record
from ctpd_jax.buckets.twin import WRITER
from ctpd_jax.errors import UserError
from ctpd_jax.job.table import STAGES, why_left_out
from ctpd_jax.train.metrics import read_metrics

RECENT = 20  # updates that the rate is taken from
SEALS = {
    "annotate": "annotations/manifest.json",
    "propose": "proposals/done.json",
    "evaluate": "evaluation.json",
    "export": "export.json",
}


def status(workdir: Path, now: float | None = None) -> str:
    """Return who is at work, and a line for every stage: finished, at which update, or what it waits for.

    Raises UserError where there is no run.
    """
    settings = read_record(workdir / "config.json")
    if settings is None:
        raise UserError(f"{workdir} holds no run: there is no config.json.")
    config, now, lines = ConfigDict(settings), time.time() if now is None else now, read_metrics(workdir)
    heard = f", last heard {spoken(now - lines[-1]['time'])} ago" if lines else ""
    told = [f"{workdir}: {_at_work(workdir, now)}{heard}"]
    left_out = [name for name in STAGES if why_left_out(config, name)]
    for name in STAGES:
        if name not in left_out:
            own = [line for line in lines if line["stage"] == name]
            told.append(f"  {name:16} {_state(workdir, name, own)}")
    return "\n".join([*told, *([f"  left out: {', '.join(left_out)}"] if left_out else [])])


# What a run leaves, by the order in which people ask for it.
LEFT = {
    "export/": "the student in Hugging Face format",
    "report.html": "the run as a page",
    "evaluation.json": "the evaluation",
    "train/params/": "the student's parameters",
    "annotations/": "the annotated pairs",
    "metrics.jsonl": "a line an update",
}


def what_is_there(workdir: Path) -> str:
    """Return in one line what lies in the workdir."""
    there = [f"{name} ({what})" for name, what in LEFT.items() if (workdir / name).exists()]
    return f"In {workdir}: {', '.join(there) or 'nothing yet'}."


def _seal(workdir: Path, name: str) -> Path:
    return workdir / SEALS.get(name, f"{name}/done.json")


def is_news(workdir: Path, name: str) -> bool:
    """Whether a stage has ended since the page was written."""
    page, seal = workdir / "report.html", _seal(workdir, name)
    return not page.exists() or (seal.exists() and seal.stat().st_mtime_ns > page.stat().st_mtime_ns)


def _at_work(workdir: Path, now: float) -> str:
    """Who holds the lock, which goes with its process; a file system without locks cannot tell."""
    writer = read_record(workdir / WRITER)  # of a bucket, whose index tells
    if writer and writer["heard"]:
        return f"process {writer['process']} on {writer['host']} was heard of {spoken(now - writer['heard'])} ago"
    try:
        with open(workdir / "lock", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"process {file.read().strip() or 'unknown'} is at work"
    except OSError:
        pass
    return "no process is at work"


def _state(workdir: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    folder = workdir / name
    if done := read_record(_seal(workdir, name)):
        left_out = f", {done['skipped']} of them left out" if "skipped" in done else ""
        return f"finished, {done['steps']} updates{left_out}" if "steps" in done else "finished"
    begun = read_record(folder / "inputs.json") if STAGES[name].trains else None
    if not begun:
        return "not finished"
    if not lines:
        return "begun"
    # The next update is the one after the last that was told; a restart goes on from the last checkpoint.
    steps, step = begun["settings"]["steps"], lines[-1]["step"] + 1
    seconds = median(line["seconds"] for line in lines[-RECENT:])
    left, loss = spoken(seconds * (steps - step)), lines[-1]["loss"]
    told = "not finite" if loss is None else f"{loss:.4g}"
    skipped = sum("skipped" in line for line in lines)
    left_out = f"; {skipped} updates left out" if skipped else ""
    return f"update {step} of {steps}, {seconds:.3g} s each, {left} left; loss {told}{left_out}"


def spoken(seconds: float) -> str:
    """12 s, 4:10 min, 3:05:00 h."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    if whole < 60:
        return f"{whole} s"
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
