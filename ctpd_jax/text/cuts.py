"""Where a text may be cut without its normal form changing: the clean cuts.

A character position c is a clean cut of a normaliser N when N(text[:c]) + N(text[c:]) == N(text). For the canonical
forms NFC and NFD a cut is lost only where characters are composed or reordered across it, so the work is done in
stretches between characters that never look back ("openers"), and only in the stretches that N really changes. The cost
is linear in the text, whatever the text is.

The normaliser itself is always the tokenizer's own. `unicodedata` only says which characters open a stretch, and
only for characters that it knows: the Unicode stability policy fixes their behaviour in every later version.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Normaliser = Callable[[str], str]

UNCLEAN = -1
# Stretches up to this length are tried cut by cut, straight from the definition; longer ones incrementally.
SHORT_STRETCH = 24
# No canonical composite has more than four characters, so among marks of one combining class those after the
# first few can neither compose nor change the order of anything.
MARKS_PER_CLASS = 8


def code_points(text: str) -> np.ndarray:
    """Return the Unicode code points of the text, uint32 [n]."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def utf8_lengths(points: np.ndarray) -> np.ndarray:
    """Return the bytes of UTF-8 per code point: uint32 [n] -> int64 [n]."""
    return 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)


def per_character(points: np.ndarray, function: Callable[[str], Any], dtype: Any) -> np.ndarray:
    """Return function(character) for each code point, [n] of dtype; called once per distinct character."""
    # A table over all code points up to the largest: sorting them would take longer.
    present = np.zeros(int(points.max(initial=0)) + 1, bool)
    present[points] = True
    distinct = np.flatnonzero(present)
    table = np.empty(len(present), dtype)
    table[distinct] = np.fromiter((function(chr(point)) for point in distinct.tolist()), dtype, len(distinct))
    return table[points]


def clean_cuts(text: str, normalise: Normaliser, plain: Normaliser) -> np.ndarray:
    """Return the byte offset in N(text) of every clean cut, int64 [n + 1]; UNCLEAN (-1) where the position is none.

    normalise: N. plain: the part of N that acts on single characters (the space marker read as a space); N differs
    from it by canonical normalisation alone. Entry 0 is 0 and entry n is len(N(text)) in bytes.
    """
    # 1. Stretches, and the offsets as they are if no stretch has more than one character.
    points = code_points(text)
    opens = per_character(points, _opens, bool)
    opens[:1] = True
    offsets = _character_offsets(points, normalise)
    starts = np.flatnonzero(opens)
    ends = np.append(starts[1:], len(points))
    several = ends - starts > 1
    # 2. The cuts inside longer ones. A text has few distinct stretches.
    places: dict[str, list[int]] = {}
    for start, end in zip(starts[several].tolist(), ends[several].tolist()):
        places.setdefault(text[start:end], []).append(start)
    clean = np.ones(len(points) + 1, bool)
    change = np.zeros(len(points) + 1, np.int64)  # what to add to the offsets from each position on
    for stretch, begins in places.items():
        cuts = _cuts_of_stretch(stretch, normalise, plain)
        inner = cuts != UNCLEAN
        assumed = offsets[begins[0] : begins[0] + len(cuts)] - offsets[begins[0]]
        at = np.array(begins)[:, None] + np.arange(1, len(cuts))
        clean[at] = inner[1:]
        # Telescoping differences: at each position of the stretch the sum of `change` is cuts - assumed.
        change[at] = np.diff(np.where(inner, cuts - assumed, 0))
    return np.where(clean, offsets + np.cumsum(change), UNCLEAN)


def _character_offsets(points: np.ndarray, normalise: Normaliser) -> np.ndarray:
    """Return where each character begins and the last one ends if N is taken of each by itself, int64 [n + 1]."""
    lengths = per_character(points, lambda character: len(normalise(character).encode()), np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


@cache
def _composes_backwards() -> frozenset[str]:
    """Return every character that can be the second half of a canonical composition."""
    seconds = {chr(p) for p in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # Hangul vowels and finals
    for point in range(0x110000):
        decomposition = unicodedata.decomposition(chr(point))
        if " " in decomposition and decomposition[0] != "<":
            seconds.add(chr(int(decomposition.split()[1], 16)))
    return frozenset(seconds)


@cache
def _opens(character: str) -> bool:
    """Tell whether nothing before a character can change it or be changed by it: a cut before it is always clean."""
    if character < "\u0300":
        return True
    if unicodedata.category(character) == "Cn":  # unassigned here, perhaps a combining mark to the tokenizer
        return False
    first = unicodedata.normalize("NFD", character)[0]
    return unicodedata.combining(first) == 0 and first not in _composes_backwards()


def _cuts_of_stretch(stretch: str, normalise: Normaliser, plain: Normaliser) -> np.ndarray:
    """Return the clean cuts inside a stretch, int64 [len + 1], as byte offsets in its normal form."""
    whole = normalise(stretch)
    if whole == plain(stretch):
        return _character_offsets(code_points(stretch), plain)
    if len(stretch) > SHORT_STRETCH:
        return _cuts_incrementally(stretch, normalise)
    cuts = np.full(len(stretch) + 1, UNCLEAN, np.int64)
    for position in range(len(stretch) + 1):
        left = normalise(stretch[:position])
        if left + normalise(stretch[position:]) == whole:
            cuts[position] = len(left.encode())
    return cuts


def _cuts_incrementally(stretch: str, normalise: Normaliser) -> np.ndarray:
    """Return the same in linear time, for stretches such as a letter under a thousand marks.

    Only the text since the last clean cut matters on the left, and only what follows up to the next starter on the
    right; of marks of one combining class only the first few matter on either side.
    """
    following = _following_marks(stretch)
    cuts = np.full(len(stretch) + 1, UNCLEAN, np.int64)
    cuts[0] = 0
    since = 0  # the last clean cut
    before = ""  # the text from there, without the marks which cannot matter any more
    seen: Counter[int] = Counter()  # marks of each class since the last starter
    for position in range(1, len(stretch)):
        # 1. One more character on the left.
        for part in unicodedata.normalize("NFD", stretch[position - 1]):
            combining = unicodedata.combining(part)
            if combining == 0:
                seen.clear()
            elif seen[combining] == MARKS_PER_CLASS:
                continue
            else:
                seen[combining] += 1
            before += part
        # 2. Whether it can be cut here; from a cut on all that is before it is forgotten.
        after = following[position]
        if normalise(before) + normalise(after) == normalise(before + after):
            cuts[position] = cuts[since] + len(normalise(stretch[since:position]).encode())
            since, before = position, ""
            seen.clear()
    cuts[-1] = cuts[since] + len(normalise(stretch[since:]).encode())
    return cuts


def _following_marks(stretch: str) -> list[str]:
    """Return for each position the marks that follow up to the next starter, the first few, and that starter."""
    following = [""] * (len(stretch) + 1)
    marks: list[str] = []
    for position in reversed(range(len(stretch))):
        for part in reversed(unicodedata.normalize("NFD", stretch[position])):
            combining = unicodedata.combining(part)
            if combining == 0:
                marks = [part]
                continue
            # Only the first few of a class: the last one goes where one comes in front.
            marks.insert(0, part)
            same = [i for i, mark in enumerate(marks) if unicodedata.combining(mark) == combining]
            if len(same) > MARKS_PER_CLASS:
                del marks[same[-1]]
        following[position] = "".join(marks)
    return following
