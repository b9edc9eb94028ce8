"""How texts, tokens and figures are written, alike in the terminal, on the page and in the model card.

Text from data keeps what can be read and loses what could steer: nothing in a data set reaches a terminal, a page or a
card as a command.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

NONE = "n/a"
FULL_COLOUR = 1.5  # |log weight| of the full colour where no setting says how far weights go

# The senses of "prefers the chosen response"; evaluate/accuracy.py defines them.
SENSES = {"per_byte": "per byte", "vs_start": "vs start", "vs_teacher": "vs teacher"}
SUBSETS = {"all": "all", "length_matched": "length-matched"}

_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
# Written out as <U+200B>: controls, format characters (zero-width, direction), line separators, no characters at all.
_WRITTEN_OUT = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# ------------------------------------------------------------------------------------------------ texts


def visible(text: str) -> str:
    """Return a text to be examined: white space, invisible and control characters are made visible."""
    shown = []
    for character in text:
        if character in _VISIBLE:
            shown.append(_VISIBLE[character])
        elif unicodedata.category(character) in _WRITTEN_OUT or character.isspace():
            shown.append(f"<U+{ord(character):04X}>")
        else:
            shown.append(character)
    if text and unicodedata.category(text[0]).startswith("M"):
        shown.insert(0, "◌")  # a mark needs something to stand on
    return "".join(shown)


def harmless(text: str) -> str:
    """Return a text to be read: only what could steer a terminal or a page is made visible."""
    return "".join(
        f"<U+{ord(c):04X}>" if c not in "\n\t" and (unicodedata.category(c) in {"Cc", "Cs"} or c in _DIRECTION) else c
        for c in text
    )


# Every string that a template prints is made harmless first, and escaped where the template is HTML.
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=lambda name: name is None or not name.endswith(".md.jinja"),
    finalize=lambda value: harmless(value) if type(value) is str else value,
    trim_blocks=True,
    lstrip_blocks=True,
)

# ------------------------------------------------------------------------------------------------ tokens


def side_title(name: str, side: Mapping[str, Any]) -> str:
    """Return "chosen: 12 spans, 14 teacher tokens, 17 student tokens", and that the response is cut if it is."""
    spans = side["spans"]
    counts = [sum(len(span[model]) for span in spans) for model in ("teacher", "student")]
    cut = ", cut to the length limit" if side.get("truncated") else ""
    return f"{name}: {len(spans)} spans, {counts[0]} teacher tokens, {counts[1]} student tokens{cut}"


# ------------------------------------------------------------------------------------------------ figures


def share(found: Mapping[str, Any] | None) -> str:
    """Return an accuracy as "62.5 [55.1, 69.3]", in per cent."""
    if not found:
        return NONE
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def percent(value: float | None) -> str:
    """Return a share as "62.5 %"."""
    return NONE if value is None else f"{100 * value:.1f} %"


def figure(value: float | None, digits: int) -> str:
    """Return a number with so many decimals, or with so many significant digits where those would hide it."""
    if value is None:
        return NONE
    if value and not 0.1**digits <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.{digits}f}"


def full_colour(config: Any) -> float | None:
    """Return the largest |log weight| that the settings allow, None where they do not say or allow one weight only.

    A weight is k exp(mu clip(d, lower, upper)), with -mu for the rejected response.
    """
    try:
        k, mu, lower, upper = (float(config["weights"][name]) for name in ("k", "mu", "lower", "upper"))
        found = max(abs(math.log(k) + sign * mu * bound) for sign in (1, -1) for bound in (lower, upper))
    except (KeyError, TypeError, ValueError):  # no config, or one of another version
        return None
    return found if 0 < found < math.inf else None


def strength(weight: float | None, full: float | None) -> float | None:
    """Return how a weight is coloured, from -1 (full cold) to 1 (full hot); None without a weight.

    Colours are those of log weights: half and twice the weight are equally far from 1.
    """
    if weight is None:
        return None
    return max(-1.0, min(1.0, math.log(weight) / (full or FULL_COLOUR))) if weight > 0 else -1.0


def other_figures(row: Mapping[str, Any]) -> dict[str, str]:
    """Return column -> what a row of the evaluation holds beside accuracies."""
    lam = row.get("lambda") or {}
    return {
        "margin vs start": figure(row.get("margin_vs_start"), 3),
        "λ mean": figure(lam.get("mean"), 3),
        "λ < 0.05": percent(lam.get("below_0.05")),
        "λ > 0.95": percent(lam.get("above_0.95")),
        "bits per byte": figure(row.get("bits_per_byte"), 3),
    }


def overlap_line(shares: Mapping[str, float]) -> str:
    """Say how much of the test data is in the training data."""
    pairs, prompts = percent(shares["pairs"]), percent(shares["prompts"])
    return f"Of the test data, {pairs} of the pairs and {prompts} of the prompts are in the training data too."


def data_lines(data: Mapping[str, Any] | None) -> list[str]:
    """Say what of the held-out pairs bears on their accuracies: overlap with the training data, and cut responses."""
    if not data:
        return []
    cut = (
        f"The length limit cuts one response of {data['one_side_cut']} pairs ({data['end_of_turn']}) and both of "
        f"{data['both_cut']}."
    )
    return [overlap_line(data["in_train"]), cut]
