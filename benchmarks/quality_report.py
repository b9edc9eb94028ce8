"""Tables and figures of benchmarks/quality.py: means over seeds with 95 % intervals, and paired differences to CTPD.

Every interval is Student's t over seeds. Two methods of one seed had the same pairs, labels, models and order of
training, so their difference is taken seed by seed: what the seeds have in common cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

BASE = "ctpd"  # what the others are compared with
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f", "#bcbd22", "#e377c2")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 48, 190, 30, 40

# measure -> its heading and digits; "more is better" is said where it holds
OUTCOMES = {"reward": ("true reward of samples", 2), "accuracy": ("accuracy, %", 1)}
DETAILS = {
    "accuracy_length_matched": ("length-matched, %", 1),
    "accuracy_per_byte": ("per byte, %", 1),
    "brier": ("Brier", 3),
    "ece": ("ECE", 3),
    "weights_follow_truth": ("weights follow truth", 2),
    "bits_per_byte": ("bits per byte", 3),
    "answer_length": ("answer's length", 0),
    "lambda_below_0.05": ("λ < 0.05 at start, %", 0),
    "lambda_above_0.95": ("λ > 0.95 at start, %", 0),
}
Results = Mapping[tuple[str, str], Mapping[int, Mapping[str, float]]]  # (setting of the world, method) -> seed -> found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval by Student's t; NaN for fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def paired(results: Results, world: str, method: str, measure: str) -> list[float]:
    """Return the differences of a method to CTPD, seed by seed, over the seeds that both have."""
    own, base = results.get((world, method), {}), results.get((world, BASE), {})
    return [own[seed][measure] - base[seed][measure] for seed in sorted(own.keys() & base.keys())]


def values_of(results: Results, world: str, method: str, measure: str) -> list[float]:
    found = results.get((world, method), {})
    return [found[seed][measure] for seed in sorted(found) if measure in found[seed]]


# ------------------------------------------------------------------------------------------------ tables


def spread(values: Sequence[float], digits: int, percent: bool = False, sign: bool = False) -> str:
    """Say "1.21 ± 0.10", the half width of the interval behind the mean; "" where there is nothing."""
    if not values:
        return ""
    mean, half = (100 * x if percent else x for x in interval(values))
    behind = "" if np.isnan(half) else f" ± {half:.{digits}f}"
    return f"{mean:{'+' if sign else ''}.{digits}f}{behind}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def outcome_table(results: Results, world: str, methods: Mapping[str, str]) -> str:
    """What counts: true reward and accuracy, each with the paired difference to CTPD."""
    headings = ["method", "", "seeds"]
    for heading, _ in OUTCOMES.values():
        headings += [heading, "paired difference to CTPD"]
    rows = []
    for method, says in methods.items():
        cells = [f"`{method}`", says, str(len(results[world, method]))]
        for measure, (heading, digits) in OUTCOMES.items():
            percent = "%" in heading
            cells.append(spread(values_of(results, world, method, measure), digits, percent))
            differences = [] if method == BASE else paired(results, world, method, measure)
            cells.append(spread(differences, digits, percent, sign=True))
        rows.append(cells)
    return table(headings, rows)


def detail_table(results: Results, world: str, methods: Mapping[str, str]) -> str:
    """Everything else that is measured."""
    rows = [
        [f"`{method}`"]
        + [
            spread(values_of(results, world, method, measure), digits, "%" in heading)
            for measure, (heading, digits) in DETAILS.items()
        ]
        for method in methods
    ]
    return table(["method", *(heading for heading, _ in DETAILS.values())], rows)


def curve_table(
    results: Results, worlds: Mapping[str, str], methods: Mapping[str, str], measure: str, differences: bool
) -> str:
    """One measure over the settings of the world, {its name: how it is headed}; or its paired difference to CTPD."""
    heading, digits = OUTCOMES[measure]
    rows = []
    for method in methods:
        if differences and method == BASE:
            continue
        of = paired if differences else values_of
        found = [of(results, world, method, measure) for world in worlds]
        rows.append([f"`{method}`", *(spread(values, digits, "%" in heading, differences) for values in found)])
    return table([f"{heading}{', difference to CTPD' if differences else ''}", *worlds.values()], rows)


# ------------------------------------------------------------------------------------------------ figures


def figure(title: str, ticks: Sequence[str], curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return an SVG: a curve for each method over the settings, (mean, half of its interval) at each."""
    # 1. The range that all intervals fill.
    points = [(m, 0.0 if np.isnan(h) else h) for curve in curves.values() for m, h in curve if not np.isnan(m)]
    low, high = min(m - h for m, h in points), max(m + h for m, h in points)
    pad = 0.05 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def down(y: float) -> float:
        return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    # 2. Axes.
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f'<text x="{LEFT}" y="18" font-size="13">{title}</text>'
    ]
    for y in np.linspace(low + pad, high - pad, 5):
        parts.append(f'<path d="M{LEFT} {down(y):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    step = (WIDTH - LEFT - RIGHT) / len(ticks)
    for number, tick in enumerate(ticks):
        x = LEFT + (number + 0.5) * step
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick}</text>')
    # 3. Curves side by side, so that their intervals can be told apart.
    for number, (name, curve) in enumerate(curves.items()):
        colour, shift = COLOURS[number % len(COLOURS)], (number - (len(curves) - 1) / 2) * 5
        places = [(LEFT + (i + 0.5) * step + shift, m, h) for i, (m, h) in enumerate(curve) if not np.isnan(m)]
        line = " ".join(f"{x:.1f},{down(m):.1f}" for x, m, _ in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, m, h in places:
            parts.append(f'<circle cx="{x:.1f}" cy="{down(m):.1f}" r="3" fill="{colour}"/>')
            if not np.isnan(h):
                parts.append(f'<path d="M{x:.1f} {down(m - h):.1f}V{down(m + h):.1f}" stroke="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{TOP + 16 * number + 10}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def frontier(points: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return an SVG: every setting that was tried, by bits per byte and true reward, a method's joined by a line."""
    points = {name: sorted(own) for name, own in points.items() if own}
    (left, right), (low, high) = (
        (min(values), max(values)) for values in zip(*(point for own in points.values() for point in own), strict=True)
    )
    width = (right - left) or 1.0

    def place(point: tuple[float, float]) -> str:
        across = LEFT + (point[0] - left) / width * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{TOP + (high - point[1]) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f'<text x="{LEFT}" y="18" font-size="13">true reward of samples against bits per byte, every setting</text>'
    ]
    for value in np.linspace(low, high, 5):
        x, y = place((left, float(value))).split(",")
        parts.append(f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in np.linspace(left, right, 5):
        x = place((float(value), low)).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:.3g}</text>')
    for number, (name, own) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(map(place, own))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.4"/>')
        for point in own:
            x, y = place(point).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{TOP + 16 * number + 10}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


# ------------------------------------------------------------------------------------------------ all of it


def fluent_table(
    results: Results, world: str, settings: Mapping[str, tuple[float, float]], says: Mapping[str, str]
) -> str:
    """The outcomes at CTPD's fluency, with the settings that keep it."""
    measured = {method: text for method, text in says.items() if (world, method) in results}
    chosen = table(["method", "knob", "learning rate"], _setting_rows(measured, settings))
    return "\n\n".join(["### At CTPD's fluency", outcome_table(results, world, measured), chosen]) + "\n"


def report(
    folder: Path,
    results: Results,
    settings: Mapping[str, tuple[float, float]],
    says: Mapping[str, str],
    kinds: Mapping[str, Mapping[str, str]],
) -> str:
    """Write the figures; return the tables.

    Args:
      settings: method -> its chosen knob and learning rate.
      says: method -> what it is.
      kinds: "noise" and the like -> {name of a world without its seed: its heading}; the first of "nominal" is the
        world of the main table.
    """
    nominal = next(iter(kinds["nominal"]))
    measured = {method: text for method, text in says.items() if (nominal, method) in results}
    parts = ["### Chosen settings", table(["method", "knob", "learning rate"], _setting_rows(measured, settings))]
    parts += ["### All methods", outcome_table(results, nominal, measured), detail_table(results, nominal, measured)]
    for kind, worlds in kinds.items():
        present = {world: heading for world, heading in worlds.items() if any(w == world for w, _ in results)}
        if len(present) < 2:
            continue
        # Only methods that were measured in every world of the kind make a curve.
        everywhere = {method: text for method, text in says.items() if all((w, method) in results for w in present)}
        parts.append(f"### By {kind}")
        for measure, (heading, _) in OUTCOMES.items():
            for differences in (False, True):
                parts.append(curve_table(results, present, everywhere, measure, differences))
            curves = {m: [interval(values_of(results, w, m, measure)) for w in present] for m in everywhere}
            svg = figure(f"{heading} by {kind}", list(present.values()), curves)
            (folder / f"{kind}-{measure}.svg").write_text(svg, encoding="utf-8")
    return "\n\n".join(parts) + "\n"


def _setting_rows(methods: Mapping[str, Any], settings: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    return [[f"`{name}`", *(f"{value:g}" for value in settings[name])] for name in methods if settings[name] != (0, 0)]
