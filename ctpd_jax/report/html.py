"""One self-contained page of a run: report.html, with no script and nothing to fetch.

Everything that comes from data is escaped: it is only ever text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ctpd_jax.artifacts import read_json, write_bytes
from ctpd_jax.report import show
from ctpd_jax.report.figures import curves, interval, series, short
from ctpd_jax.report.style import STYLE
from ctpd_jax.schema import SIDES
from ctpd_jax.train.metrics import read_metrics

REPORT = "report.html"
MAX_HEAT_SPANS = 2000  # of one response
FULL_COLOUR = 1.5  # |log weight| of the full colour where no setting says how far weights go

LOG_2 = math.log(2)
# title, metric -> label in the legend, level to mark, range that must be visible
PANELS: tuple[tuple[str, dict[str, str], float | None, tuple[float, float] | None], ...] = (
    ("loss", {"loss": "loss"}, LOG_2, None),
    (
        "rewards",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"},
        0.0,
        None,
    ),
    ("margin relative to the start", {"rewards/margin_from_start": "margin"}, 0.0, None),
    ("reward accuracy", {"rewards/accuracies": "accuracy"}, 0.5, (0.0, 1.0)),
    (
        "λ",
        {"lambda/mean": "mean", "lambda/below_low": "share < 0.05", "lambda/above_high": "share > 0.95"},
        None,
        (0.0, 1.0),
    ),
    ("gradient norm", {"grad_norm": "norm"}, None, None),
    ("tokens per second", {"tokens_per_second": "tokens/s"}, None, None),
)


def write_report(workdir: Path) -> Path:
    """Writes report.html from what the run has left in `workdir` so far, and returns its path.

    Reads evaluation.json, metrics.jsonl, data_train.json, data_test.json and config.json; what is not there is left
    out of the page. Raises UserError naming the file that is not JSON.
    """
    evaluation = read_json(workdir / "evaluation.json") or {}
    config = read_json(workdir / "config.json")
    data = {split: found for split in ("train", "test") if (found := read_json(workdir / f"data_{split}.json"))}
    sections = [
        _results(evaluation),
        _curves(read_metrics(workdir)),
        _example(evaluation.get("example"), full_colour(config)),
        _samples(evaluation.get("samples")),
        _data(data),
        _settings(config),
    ]
    body = "\n".join(section for section in sections if section) or "<p>This run has written nothing yet.</p>"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(workdir.name)} · ctpd</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p>Cross-tokenizer preference distillation</p><h1>{_text(workdir.name)}</h1></header>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )
    path = workdir / REPORT
    write_bytes(path, page.encode("utf-8", errors="replace"))  # a lone surrogate in data is no reason to fail
    return path


def _text(value: Any) -> str:
    """Anything as text of the page."""
    return escape(show.harmless(str(value)), quote=True)


def _section(title: str, note: str, *parts: str) -> str:
    lead = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{lead}\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table from cells that are HTML already; the first cell of a row is its head."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for row in rows:
        first, *rest = row
        body.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>'
        + "\n".join(body)
        + "</tbody></table></div>"
    )


# ------------------------------------------------------------------------------------------------ results


def _results(evaluation: Mapping[str, Any]) -> str:
    models: Mapping[str, Mapping[str, Any]] = evaluation.get("models") or {}
    if not models:
        return ""
    longer = evaluation.get("longer_is_better") or {}
    tables = []
    for subset, label in show.SUBSETS.items():
        base = longer.get(subset)
        rows = [
            [_text(name), *(_accuracy((row.get(subset) or {}).get(sense), base) for sense in show.SENSES)]
            for name, row in models.items()
        ]
        count = base["count"] if base else 0
        tables.append(
            f"<h3>{label[0].upper()}{label[1:]} pairs <small>n = {count}</small></h3>"
            + _table(["model", *show.SENSES.values()], rows, "figures")
            + f'<p class="note">Baseline, the longer response is the chosen one: <b>{show.share(base)}</b></p>'
        )
    note = (
        "How often a model prefers the chosen response, in per cent with the 95 % interval: by log-probability per "
        "byte, by implicit reward against the model’s own start (the student’s SFT checkpoint; for teacher_dpo, the "
        "teacher), and against the teacher. All weights are one here. The dashed tick is the baseline that always "
        "takes the longer response, the short one is one half."
    )
    data = [f'<p class="note">{_text(line)}</p>' for line in show.data_lines(evaluation.get("data"))]
    parts = [_key_figures(evaluation), *tables, *data, _other_figures(models)]
    return _section("Results", note, *parts)


def _accuracy(found: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> str:
    if not found:
        return f'<span class="none">{show.NONE}</span>'
    value, _, rest = show.share(found).partition(" ")
    return f"<b>{value}</b> <small>{rest}</small>{interval(found, base['value'] if base else None)}"


def _key_figures(evaluation: Mapping[str, Any]) -> str:
    """What became of the student, in a line of large numbers."""
    start, end = (evaluation["models"].get(name) or {} for name in ("student_start", "ctpd"))
    cells = []
    senses = [(row.get("all") or {}).get("per_byte") for row in (start, end)]
    if all(senses):
        cells.append(("per-byte accuracy", " → ".join(f"{100 * found['value']:.1f}" for found in senses if found)))
    if end.get("bits_per_byte") is not None and start.get("bits_per_byte") is not None:
        cells.append(("bits per byte, chosen", " → ".join(f"{r['bits_per_byte']:.2f}" for r in (start, end))))
    if evaluation.get("pairs") is not None:
        cells.append(("held-out pairs", _text(evaluation["pairs"])))
    return '<dl class="key">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in cells) + "</dl>"


def _other_figures(models: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, row in models.items():
        lam = row.get("lambda") or {}
        cells = [
            show.figure(row.get("margin_vs_start"), 3),
            show.figure(lam.get("mean"), 3),
            show.percent(lam.get("below_0.05")),
            show.percent(lam.get("above_0.95")),
            show.figure(row.get("bits_per_byte"), 3),
        ]
        rows.append([_text(name), *(f'<span class="none">{c}</span>' if c == show.NONE else _text(c) for c in cells)])
    head = ["model", "margin vs start", "λ mean", "λ &lt; 0.05", "λ &gt; 0.95", "bits per byte"]
    note = (
        '<p class="note">λ is the weight that the loss gives a pair: near 0 the pair is ignored, near 1 it is pulled '
        "as hard as possible.</p>"
    )
    made = _table(head, rows, "figures")
    return "<h3>Margins and the anchor</h3>" + note + made


# ------------------------------------------------------------------------------------------------ curves


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        stages.setdefault(str(line["stage"]), []).append(line)
    parts = []
    for stage, own in stages.items():
        preference = any("rewards/margins" in line for line in own)
        panels = [
            curves(
                title,
                {label: series(own, metric) for metric, label in metrics.items()},
                level if preference else None,
                bounds,
            )
            for title, metrics, level, bounds in PANELS
        ]
        updates = max(int(line["step"]) for line in own) + 1
        if any(panels):
            parts.append(
                f"<h3>{_text(stage)} <small>{short(updates)} updates</small></h3>"
                f'<div class="panels">{"".join(panels)}</div>'
            )
    note = (
        "Over the updates of each stage, with the first and the last value. Dashed: log 2 for the loss of pairs, 0 for "
        "rewards, one half for accuracies. With the teacher as reference, rewards do not start at 0 nor the loss at "
        "log 2; the margin relative to the start does start at 0."
    )
    return _section("Training", note, *parts) if parts else ""


# ------------------------------------------------------------------------------------------------ example


def full_colour(config: Any) -> float | None:
    """The largest |log weight| that the settings allow: k exp(mu clip(d, lower, upper)), with -mu for the rejected.

    None where they do not say, or allow one weight only.
    """
    weights = config.get("weights") if isinstance(config, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    found = [weights.get(name) for name in ("k", "mu", "lower", "upper")]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in found):
        return None
    k, mu, lower, upper = (float(value) for value in found if value is not None)
    if k <= 0:
        return None
    return max(abs(math.log(k) + sign * mu * bound) for sign in (1, -1) for bound in (lower, upper)) or None


def _example(example: Mapping[str, Any] | None, full: float | None) -> str:
    if not example:
        return ""
    prompt = "".join(
        f'<p class="said" dir="auto"><b>{_text(m["role"])}</b> {_text(m["content"])}</p>'
        for m in example.get("prompt") or ()
    )
    sides = [_side(name, example[name], full or FULL_COLOUR) for name in SIDES if name in example]
    weighted = any(s.get("weight") is not None for name in SIDES for s in (example.get(name) or {"spans": ()})["spans"])
    scale = "below 1 … above 1"
    if full is not None:
        low, high = (show.figure(math.exp(sign * min(full, 700.0)), 2) for sign in (-1, 1))
        scale = f"{low} … <b>1</b> … {high}"
    legend = (
        f'<p class="legend"><span class="strip"></span> weight {scale}, uncoloured at 1</p>'
        if weighted
        else '<p class="legend">Not annotated yet: no weights.</p>'
    )
    note = (
        f"Pair <code>{_text(example.get('id', ''))}</code> {_text(example.get('source') or '')}. Each box is a span, "
        "cut where both tokenizers have a border; dotted below where a span is not one token facing one. Hold the "
        "pointer over a span to see its tokens."
    )
    return _section("An aligned pair", note, prompt, legend, *sides)


def _side(name: str, side: Mapping[str, Any], full: float) -> str:
    spans = side["spans"]
    heat = "".join(_heat(span, full) for span in spans[:MAX_HEAT_SPANS])
    if len(spans) > MAX_HEAT_SPANS:
        heat += f" … and {len(spans) - MAX_HEAT_SPANS} more spans"
    rows = [
        [
            str(number),
            escape(show.span_text(span)),
            _tokens(span["teacher"]),
            _tokens(span["student"]),
            show.proportion(span),
            show.figure(span.get("weight"), 2),
        ]
        for number, span in enumerate(spans[:MAX_HEAT_SPANS])
    ]
    listed = _table(["span", "text", "teacher tokens", "student tokens", "m:n", "weight"], rows, "spans")
    return (
        f"<h3>{_text(show.side_title(name, side))}</h3>"
        f'<p class="heat" dir="auto">{heat}</p><details><summary>span by span</summary>{listed}</details>'
    )


def _heat(span: Mapping[str, Any], full: float) -> str:
    weight = span.get("weight")
    colour, kind = "", "s" if len(span["teacher"]) == len(span["student"]) == 1 else "s many"
    if weight is not None:
        strength = max(-1.0, min(1.0, math.log(weight) / full)) if weight > 0 else -1.0
        colour = f' style="background:rgb(var(--{"hot" if strength > 0 else "cold"})/{0.62 * abs(strength):.2f})"'
    lines = [f"{model}: " + show.BORDER.join(show.visible(t) for t in span[model]) for model in ("teacher", "student")]
    lines.append(f"weight: {show.figure(weight, 3)}")
    title = escape("\n".join(lines), quote=True)
    # A line break inside a span is shown and kept.
    text = "↵\n".join(_text(part) for part in span["text"].split("\n")) if span["text"] else "<small> end </small>"
    return f'<span class="{kind}"{colour} title="{title}">{text}</span>'


def _tokens(pieces: Sequence[str]) -> str:
    return "".join(f"<code>{escape(show.visible(piece))}</code>" for piece in pieces)


# ------------------------------------------------------------------------------------------------ the rest


def _samples(samples: Mapping[str, Sequence[Mapping[str, str]]] | None) -> str:
    """The models' answers side by side, a row of cards for each prompt."""
    by_prompt: dict[str, dict[str, list[str]]] = {}
    for row, drawn in (samples or {}).items():
        for sample in drawn:
            by_prompt.setdefault(sample["prompt"], {}).setdefault(row, []).append(sample["answer"])
    parts = []
    for prompt, rows in by_prompt.items():
        cards = "".join(
            f"<div><h4>{_text(row)}</h4>"
            + "".join(f'<p dir="auto">{_text(answer) or "<i>(empty)</i>"}</p>' for answer in answers)
            + "</div>"
            for row, answers in rows.items()
        )
        parts.append(f'<p class="said" dir="auto">{_text(prompt)}</p><div class="cards">{cards}</div>')
    return _section("Samples", "What each model answers to held-out prompts.", *parts) if parts else ""


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    if not data:
        return ""
    names = list(dict.fromkeys(name for counts in data.values() for name in counts if name != "first"))
    rows = [
        [_text(name), *(_count(counts[name]) if name in counts else "" for counts in data.values())] for name in names
    ]
    return _section("Data", "What was read, cut and left out.", _table(["", *data], rows, "figures"))


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _settings(config: Any) -> str:
    if config is None:
        return ""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return _section("Settings", "", f"<details><summary>config.json</summary><pre>{_text(text)}</pre></details>")
