"""How a data set is cut into spans: by side, by length and by script, before anything was trained.

Letters: N responses, S spans of one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from ctpd_jax.schema import SIDES, AlignedPair, PreferencePair

CHARACTERS = 1000  # of a response that decide its script
SIZE = 9  # the column of a response's bytes below
SCRIPTS = 6  # groups of their own; rarer ones are "other scripts"


def span_statistics(pairs: Sequence[AlignedPair], raw: Mapping[str, PreferencePair]) -> dict[str, dict[str, float]]:
    """Return group -> figure -> value, for all responses and for groups of them.

    Figures: responses; spans of a response; shares of the spans with one or more teacher tokens facing one or more of
    the student's (one_one, one_many, many_one, many_many); tokens of each model in a span; share of the bytes that are
    covered; share of the responses that were cut.
    """
    # 1. Every response: its counts, and the groups that it belongs to.
    counts, names = [], []
    for pair in pairs:
        texts = raw[pair.id].chosen, raw[pair.id].rejected
        for side, name in enumerate(SIDES):
            aligned = pair.response(side)
            teacher, student = (
                np.bincount(tokens.span_ids, minlength=aligned.num_spans)
                for tokens in (aligned.teacher, aligned.student)
            )
            one, other = teacher == 1, student == 1
            facing = [(one & other).sum(), (one & ~other).sum(), (~one & other).sum(), (~one & ~other).sum()]
            size = (pair.chosen_bytes, pair.rejected_bytes)[side]
            sums = [teacher.sum(), student.sum(), aligned.bounds[-1], size, pair.truncated[side]]
            counts.append([1, aligned.num_spans, *facing, *sums])
            names.append((name, script_of(texts[side])))
    table = np.array(counts, float)
    # 2. Groups: the sides, quarters by length, scripts.
    groups = {"all": np.ones(len(table), bool)}
    groups |= {name: np.array([own == name for own, _ in names]) for name in SIDES}
    edges = np.quantile(table[:, SIZE], [0, 0.25, 0.5, 0.75, 1])
    quarters = np.clip(np.searchsorted(edges, table[:, SIZE], side="right") - 1, 0, 3)
    groups |= {f"{edges[i]:,.0f} to {edges[i + 1]:,.0f} bytes": quarters == i for i in range(4)}
    # A data set in one script needs no groups by script.
    scripts = Counter(script for _, script in names)
    common = [script for script, _ in scripts.most_common(SCRIPTS)]
    if len(scripts) > 1:
        groups |= {script: np.array([own == script for _, own in names]) for script in common}
        groups["other scripts"] = np.array([own not in common for _, own in names])
    return {name: _figures(table[which].sum(axis=0)) for name, which in groups.items() if which.any()}


def _figures(sums: np.ndarray) -> dict[str, float]:
    responses, spans, *facing, teacher, student, covered, size, cut = sums.tolist()
    shares = dict(zip(("one_one", "one_many", "many_one", "many_many"), (count / spans for count in facing)))
    sizes = {"teacher": teacher / spans, "student": student / spans}
    return {
        "responses": int(responses),
        "spans": spans / responses,
        **shares,
        **sizes,
        "bytes_kept": covered / max(size, 1),
        "cut": cut / responses,
    }


def script_of(text: str) -> str:
    """Return the script of most letters at a text's beginning: "latin", "cjk", "arabic" ..., or "no letters"."""
    if text.isascii():  # most are, and counting takes its time
        return "latin" if any(map(str.isalpha, text)) else "no letters"
    found = Counter(_script(character) for character in text[:CHARACTERS] if character.isalpha())
    return found.most_common(1)[0][0] if found else "no letters"


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    # Unicode's names begin with the script; the scripts' own table is not in Python.
    return unicodedata.name(letter, "unknown").partition(" ")[0].lower()
