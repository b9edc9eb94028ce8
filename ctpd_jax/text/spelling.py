"""Where each token ends in the bytes of a text, found by spelling the text with the tokens' bytes.

Nearly every token stands for the same bytes wherever it occurs, and one vectorised comparison settles a text. What it
does not settle is searched token by token: a dummy space after an added token, an added token that takes white space
along (`lstrip`, `rstrip`) or that the model spells otherwise than the text does.

Letters: T tokens, B bytes of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ctpd_jax.text.tokenizer_json import Prefix, Vocabulary


class Spelt(NamedTuple):
    """A text as tokens."""

    ids: np.ndarray  # int32 [T]
    ends: np.ndarray  # int64 [T]: where each ends in the bytes of N(text), the normalised text
    normalized: str  # N(text)


def compare(
    vocabulary: Vocabulary, prefix: Prefix, ids: np.ndarray, data: np.ndarray, whole: bool
) -> tuple[np.ndarray | None, int]:
    """Spell a text with the usual bytes of its tokens.

    ids: int64 [T], every one of which stands for bytes. data: uint8 [B], the text. whole: they spell all of it.
    Returns the tokens' ends, int64 [T], or None if they do not spell the text; and the first byte that differs.
    """
    # The dummy space of the first token counts nothing.
    skip = np.zeros(len(ids), np.int64)
    if prefix.present and len(ids) and vocabulary.sizes[ids[0]] and vocabulary.pool[vocabulary.starts[ids[0]]] == 0x20:
        skip[0] = prefix.always or not (len(data) and data[0] == 0x20)
    count = vocabulary.sizes[ids] - skip
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    # Gather the bytes of all tokens: for byte i of the result, its place in the pool.
    begin = vocabulary.starts[ids] + skip
    spelled = vocabulary.pool[np.arange(total) + np.repeat(begin - (ends - count), count)]
    shared = min(total, len(data))
    differs = np.flatnonzero(spelled[:shared] != data[:shared])
    place = int(differs[0]) if len(differs) else shared
    same = not len(differs) and (total == len(data) if whole else total <= len(data))
    return (ends if same else None), place


def search(
    vocabulary: Vocabulary, prefix: Prefix, ids: np.ndarray, data: bytes, whole: bool, names: bool = False
) -> np.ndarray | None:
    """Spell a text with whatever its tokens may stand for; returns the tokens' ends as `compare` does.

    names: a byte piece may also have been read where somebody typed its name, "<0x41>".
    """
    # 1. Forward: for each token the places where it may end, one or two, and where it then began.
    steps: list[dict[int, int]] = []
    places = [0]
    after_added = True  # the start of a text is where a dummy space comes, too
    for token_id in ids.tolist():
        step: dict[int, int] = {}
        for place in places:
            for end in _ends(vocabulary, prefix, token_id, data, place, after_added, names):
                step.setdefault(end, place)
        steps.append(step)
        places = list(step)
        after_added = token_id in vocabulary.added
    if not places or (whole and len(data) not in places):
        return None
    # 2. Back from the end of the text.
    place = len(data) if whole else places[0]
    ends = np.zeros(len(steps), np.int64)
    for index, step in reversed(list(enumerate(steps))):
        ends[index] = place
        place = step[place]
    return ends


def _ends(
    vocabulary: Vocabulary, prefix: Prefix, token_id: int, data: bytes, place: int, dummy: bool, names: bool
) -> Iterator[int]:
    """Yield the places where a token may end that begins at `place`, the likeliest first."""
    # 1. What it may stand for.
    added = vocabulary.added.get(token_id)
    start = int(vocabulary.starts[token_id])
    usual = vocabulary.pool[start : start + int(vocabulary.sizes[token_id])].tobytes()
    spellings = added.spellings if added else (usual,)
    if names and token_id in vocabulary.byte_names:
        spellings = (*spellings, vocabulary.byte_names[token_id])
    if dummy and prefix.present:
        shorter = tuple(spelling[1:] for spelling in spellings if spelling.startswith(b" "))
        spellings = (*shorter, *spellings) if prefix.always else (*spellings, *shorter)
    # 2. Where it may begin and end, white space included.
    begins = _white(data, place) if added and added.lstrip else [place]
    for begin in begins:
        for spelling in spellings:
            if data.startswith(spelling, begin):
                end = begin + len(spelling)
                yield from _white(data, end) if added and added.rstrip else [end]


def _white(data: bytes, place: int) -> list[int]:
    """Return how far white space may be taken along from `place`: the furthest first, not at all last."""
    # Nearly every run is short, and a text may be long: ever more of it is decoded.
    size, run = 32, ""
    while len(run.encode("utf-8")) >= size - 32:
        size *= 2
        rest = data[place : place + size].decode("utf-8", "ignore")
        run = rest[: len(rest) - len(rest.lstrip())]
        if place + size >= len(data):
            break
    # A part of it, where the rest is an added token of its own. Of a very long run all or none: two tokens that share
    # one would try every pair of lengths.
    lengths = range(len(run), -1, -1) if len(run) <= 1000 else (len(run), 0)
    return [place + len(run[:count].encode("utf-8")) for count in lengths]
