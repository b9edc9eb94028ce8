"""One self-contained page of a run: report.html, with no script and nothing to fetch.

Everything that comes from data is escaped by the template: it is only ever text.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctpd_jax.artifacts import read_record, write_bytes
from ctpd_jax.report import format as wording
from ctpd_jax.report.curves import curves, interval, series, short
from ctpd_jax.report.format import TEMPLATES, figure
from ctpd_jax.schema import SIDES
from ctpd_jax.train.metrics import METRICS, lost_lines, read_metrics

MANIFEST = "annotations/manifest.json"
MAX_HEAT_SPANS = 2000  # of one response

LAMBDA = {"lambda/mean": "mean", "lambda/below_low": "share < 0.05", "lambda/above_high": "share > 0.95"}
# title, metric -> label in the legend, level to mark, range that must be visible
PANELS: tuple[tuple[str, dict[str, str], float | None, tuple[float, float] | None], ...] = (
    ("loss", {"loss": "loss"}, math.log(2), None),
    ("rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}, 0.0, None),
    ("margin relative to the start", {"rewards/margin_from_start": "margin"}, 0.0, None),
    ("reward accuracy", {"rewards/accuracies": "accuracy"}, 0.5, (0.0, 1.0)),
    ("λ", LAMBDA, None, (0.0, 1.0)),
    ("held-out loss, against the start", {"eval/loss": "loss"}, math.log(2), None),
    ("held-out accuracy, against the start", {"eval/rewards/accuracies": "accuracy"}, 0.5, (0.0, 1.0)),
    ("learning rate", {"lr": "rate"}, None, None),
    ("gradient norm", {"grad_norm": "norm"}, None, None),
    ("tokens per second", {"tokens_per_second": "tokens/s"}, None, None),
    ("device memory at its peak, GB", {"peak_memory_gb": "GB"}, None, None),
)


def write_report(workdir: Path) -> Path:
    """Write report.html from what the run has left in `workdir` so far, and return its path.

    Reads evaluation.json, metrics.jsonl, data_train.json, data_test.json, config.json and the store's manifest; what is
    not there is left out of the page. Raises UserError naming the file that is not JSON.
    """
    evaluation = read_record(workdir / "evaluation.json") or {}
    config = read_record(workdir / "config.json")
    data = {split: found for split in ("train", "test") if (found := read_record(workdir / f"data_{split}.json"))}
    lines = read_metrics(workdir)
    if lost := lost_lines(workdir, lines):
        told = f"{workdir / METRICS} has lost lines of {', '.join(lost)}: their curves are not whole."
        warnings.warn(told, stacklevel=2)
    # Values are made here, words and their order stand in the template.
    page = TEMPLATES.get_template("report.html.jinja").render(
        name=workdir.name,
        evaluation=evaluation,
        stages=_stages(lines),
        lost=lost,
        shown=_shown(evaluation, wording.full_colour(config)),
        weights=evaluation.get("weights"),
        samples=_by_prompt(evaluation.get("samples") or {}),
        data=data,
        counted=list(dict.fromkeys(name for counts in data.values() for name in counts if name != "first")),
        config=_told(config),
        manifest=_told(read_record(workdir / MANIFEST)),
        format=wording,
        interval=interval,
    )
    path = workdir / "report.html"
    write_bytes(path, page.lstrip().encode("utf-8", errors="replace"))  # a lone surrogate in data is no reason to fail
    return path


def _told(record: Mapping[str, Any] | None) -> str | None:
    return None if record is None else json.dumps(record, indent=2, ensure_ascii=False)


def _stages(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the panels of each stage that has any, in the order of the log."""
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_stage.setdefault(str(line["stage"]), []).append(line)
    stages = []
    for name, own in by_stage.items():
        # The levels mean something for pairs alone: log 2 is no special loss of SFT.
        preference = any("rewards/margins" in line for line in own)
        panels = []
        for title, metrics, level, bounds in PANELS:
            named = {label: series(own, metric) for metric, label in metrics.items()}
            panels.append(curves(title, named, level if preference else None, bounds))
        if any(panels):
            updates = max(int(line["step"]) for line in own) + 1
            stages.append({"name": name, "updates": short(updates), "panels": panels})
    return stages


def pair_page(pair: Mapping[str, Any], full: float | None) -> bytes:
    """Return the page of one pair, in UTF-8; see `report.pair.pair_record` and `format.full_colour`."""
    page = TEMPLATES.get_template("inspect.html.jinja").render(pair=_drawn(pair, full), format=wording)
    return page.lstrip().encode("utf-8", errors="replace")


def _shown(evaluation: Mapping[str, Any], full: float | None) -> dict[str, dict[str, Any]]:
    """Return heading -> aligned pair, drawn: the first one, and those of which the teacher is surest and least sure."""
    pairs = {"An aligned pair": evaluation.get("example")}
    for name, pair in (evaluation.get("examples") or {}).items():
        pairs[f"The {name} pair, by the teacher’s margin"] = pair
    return {name: drawn for name, pair in pairs.items() if (drawn := _drawn(pair, full))}


def _drawn(pair: Mapping[str, Any] | None, full: float | None) -> dict[str, Any] | None:
    """Return the aligned pair with what its drawing needs: the scale of the colours, and each span's place on it."""
    if not pair:
        return None
    sides, weighted = [], False
    for name in SIDES:
        side = pair[name]
        weighted = weighted or any(span.get("weight") is not None for span in side["spans"])
        drawn = [span | _heat(span, full) for span in side["spans"][:MAX_HEAT_SPANS]]
        more = len(side["spans"]) - len(drawn)
        sides.append({"title": wording.side_title(name, side), "spans": drawn, "more": more})
    # exp(710) is past the largest float; no drawing needs it.
    scale = full and [figure(math.exp(sign * min(full, 700.0)), 2) for sign in (-1, 1)]
    return {**pair, "sides": sides, "weighted": weighted, "scale": scale}


def _heat(span: Mapping[str, Any], full: float | None) -> dict[str, Any]:
    """Return the colour of a span, from -1 (full cold) to 1 (full hot), and what a pointer over it is told."""
    weight = span.get("weight")
    told = [f"{model}: {' ¦ '.join(map(wording.visible, span[model]))}" for model in ("teacher", "student")]
    told.append(f"weight: {figure(weight, 3)}")
    # A line break inside a span is shown and kept.
    return {
        "strength": wording.strength(weight, full),
        "told": "\n".join(told),
        "lines": span["text"].replace("\n", "↵\n"),
    }


def _by_prompt(samples: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, dict[str, list[str]]]:
    """Return prompt -> model -> its answers: a row of cards for each prompt."""
    by_prompt: dict[str, dict[str, list[str]]] = {}
    for model, drawn in samples.items():
        for sample in drawn:
            by_prompt.setdefault(sample["prompt"], {}).setdefault(model, []).append(sample["answer"])
    return by_prompt
