"""Small drawings as inline SVG: curves over the updates of a stage, and an accuracy with its interval.

No library and no script: the colours are classes of the page's style sheet, so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

POINTS = 240  # of one curve; longer ones are averaged in bins
WIDTH, HEIGHT = 260, 120
LEFT, RIGHT, TOP, BOTTOM = 40, 6, 8, 18

Series = list[tuple[float, float]]  # step, value


def series(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    """One metric of a stage: its finite values over the steps."""
    found = []
    for line in lines:
        value = line.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((float(line["step"]), float(value)))
    return found


def thinned(points: Series, most: int = POINTS) -> Series:
    """At most `most` points, each the mean of its bin."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def curves(
    title: str, named: Mapping[str, Series], level: float | None = None, bounds: tuple[float, float] | None = None
) -> str:
    """A panel with one curve a name, as a <figure>; "" where there is nothing to draw.

    level: a value to draw a dashed line at. bounds: the range of the vertical axis that must be visible.
    """
    shown = {name: thinned(points) for name, points in named.items() if points}
    if not shown:
        return ""
    xs = [x for points in named.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points] + list(bounds or ())
    if level is not None and (bounds or min(ys) <= level <= max(ys) or _near(level, ys)):
        ys.append(level)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high, ticks = _axis(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{short(tick)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">{short(x_low)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{short(x_high)}</text>')
    if level is not None and y_low <= level <= y_high:
        y = place(x_low, level)[1]
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    legend = []
    for number, (name, points) in enumerate(shown.items(), 1):
        drawn = [place(x, y) for x, y in points]
        if len(drawn) == 1:
            parts.append(f'<circle class="dot{number}" cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="2.5"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
            parts.append(f'<polyline class="curve{number}" points="{path}"/>')
        # What cannot be told from zero in the drawing is rounding.
        first, last = (v if abs(v) > 1e-4 * (y_high - y_low) else 0.0 for v in (named[name][0][1], named[name][-1][1]))
        label = f"{escape(name)}: " if len(shown) > 1 else ""
        legend.append(f'<span class="key{number}">{label}{short(first)} → {short(last)}</span>')
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="keys">{" ".join(legend)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over updates">'
        f"{''.join(parts)}</svg></figure>"
    )


def _near(level: float, ys: Sequence[float]) -> bool:
    """Whether a level is near enough to the values to be worth the room."""
    spread = max(ys) - min(ys)
    return min(abs(level - max(ys)), abs(level - min(ys))) <= 0.5 * spread


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """The range of an axis and a few round numbers on it."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = max(abs(high) * 0.1, 1e-3)
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    margin = 0.04 * (high - low)
    first = math.ceil((low - margin) / step)
    ticks = [step * k for k in range(first, first + 8) if step * k <= high + margin]
    return low - margin, high + margin, ticks


def short(value: float) -> str:
    """ "0.693", "1,240", "12k", "3.1M": a number for a small place."""
    if abs(value) < 1e-12:
        return "0"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def interval(found: Mapping[str, Any], baseline: float | None) -> str:
    """An accuracy on a line from 0 to 1: its interval, a tick at one half, a dashed one at the baseline."""
    width, height = 120, 12

    def x(value: float) -> str:
        return f"{2 + value * (width - 4):.1f}"

    parts = [
        f'<line class="grid" x1="{x(0)}" x2="{x(1)}" y1="6" y2="6"/>',
        f'<line class="half" x1="{x(0.5)}" x2="{x(0.5)}" y1="2" y2="10"/>',
    ]
    if baseline is not None:
        parts.append(f'<line class="level" x1="{x(baseline)}" x2="{x(baseline)}" y1="0" y2="12"/>')
    parts.append(f'<line class="range" x1="{x(found["low"])}" x2="{x(found["high"])}" y1="6" y2="6"/>')
    parts.append(f'<circle class="dot1" cx="{x(found["value"])}" cy="6" r="3"/>')
    return f'<svg class="interval" viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(parts)}</svg>'
