"""Small drawings as inline SVG: curves over the updates of a stage, and an accuracy with its interval.

No library and no script: the colours are classes of the page's style sheet, so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ctpd_jax.report.format import TEMPLATES

POINTS = 240  # of one curve; longer ones are averaged in bins
WIDTH, HEIGHT = 260, 120
LEFT, RIGHT, TOP, BOTTOM = 40, 6, 8, 18

Series = list[tuple[float, float]]  # step, value


def series(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Return one metric of a stage: its finite values over the steps."""
    found = []
    for line in lines:
        value = line.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((float(line["step"]), float(value)))
    return found


def thinned(points: Series, most: int = POINTS) -> Series:
    """Return at most `most` points, each the mean of its bin."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def curves(
    title: str, named: Mapping[str, Series], level: float | None = None, bounds: tuple[float, float] | None = None
) -> Markup:
    """Return a panel with one curve a name, as a <figure>; "" where there is nothing to draw.

    Args:
      named: label -> its points; what is empty is left out.
      level: a value to draw a dashed line at.
      bounds: the range of the vertical axis that must be visible.
    """
    # 1. The ranges of both axes. A level that is far from every value is not worth the room.
    shown = {name: thinned(points) for name, points in named.items() if points}
    if not shown:
        return Markup()
    xs = [x for points in named.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points] + list(bounds or ())
    near = 0.5 * (max(ys) - min(ys))
    if level is not None and (bounds or min(ys) - near <= level <= max(ys) + near):
        ys.append(level)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high, ticks = _axis(min(ys), max(ys))

    # 2. Numbers to places on the drawing.
    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    # 3. The first and the last value of each curve; what cannot be told from zero in the drawing is rounding.
    drawn = []
    for name, points in shown.items():
        ends = [y if abs(y) > 1e-4 * (y_high - y_low) else 0.0 for _, y in (named[name][0], named[name][-1])]
        places = [(f"{across(x):.1f}", f"{down(y):.1f}") for x, y in points]
        drawn.append({"name": name, "places": places, "first": short(ends[0]), "last": short(ends[1])})
    html = TEMPLATES.get_template("curves.html.jinja").render(
        title=title,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        ticks=[(short(tick), down(tick)) for tick in ticks],
        ends=(short(x_low), short(x_high)),
        level=down(level) if level is not None and y_low <= level <= y_high else None,
        curves=drawn,
    )
    return Markup(html)  # escaped by its template


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Return the range of an axis, with a margin, and a few round numbers on it."""
    # A flat curve gets some room above and below it.
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = max(abs(high) * 0.1, 1e-3)
        low, high = low - pad, high + pad
    # About four steps, each 1, 2, 2.5 or 5 times a power of ten.
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    margin = 0.04 * (high - low)
    first = math.ceil((low - margin) / step)
    ticks = [step * k for k in range(first, first + 8) if step * k <= high + margin]
    return low - margin, high + margin, ticks


def short(value: float) -> str:
    """Return a number for a small place: "0.693", "1,240", "12k", "3.1M"."""
    if abs(value) < 1e-12:
        return "0"
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(found: Mapping[str, Any], baseline: float | None) -> Markup:
    """Return an accuracy on a line from 0 to 1: its interval, a tick at one half, a dashed one at the baseline."""
    return Markup(TEMPLATES.get_template("interval.html.jinja").render(found=found, baseline=baseline))
