"""Where each token ends in the bytes of a text, found by spelling the text with the tokens' bytes.

Nearly every token stands for the same bytes wherever it occurs, and one vectorised comparison settles a text. What it
does not settle is searched token by token: a dummy space after an added token, an added token that takes white space
along (`lstrip`, `rstrip`) or that the model spells otherwise than the text does.

Letters: T tokens, B bytes of the text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ctpd_jax.text.tokenizer_json import Added, Prefix, Vocabulary

# White space that two tokens could share in every way, in characters: of a longer run one takes all or none.
LONGEST_SHARED = 1000


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
    takes = {number for number, added in vocabulary.added.items() if added.lstrip or added.rstrip}
    runs = {} if takes.isdisjoint(ids.tolist()) else _white_runs(data)
    after_added = True  # the start of a text is where a dummy space comes, too
    for token_id in ids.tolist():
        spellings = _spellings(vocabulary, prefix, token_id, after_added, names)
        steps.append(_ends(vocabulary.added.get(token_id), spellings, data, runs, places))
        places = list(steps[-1])
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


def _spellings(vocabulary: Vocabulary, prefix: Prefix, token_id: int, dummy: bool, names: bool) -> tuple[bytes, ...]:
    """Return what a token may stand for, the likeliest first. `dummy`: a dummy space may come before it."""
    added = vocabulary.added.get(token_id)
    start = int(vocabulary.starts[token_id])
    usual = vocabulary.pool[start : start + int(vocabulary.sizes[token_id])].tobytes()
    spellings = added.spellings if added else (usual,)
    if names and token_id in vocabulary.byte_names:
        spellings = (*spellings, vocabulary.byte_names[token_id])
    if dummy and prefix.present:
        shorter = tuple(spelling[1:] for spelling in spellings if spelling.startswith(b" "))
        spellings = (*shorter, *spellings) if prefix.always else (*spellings, *shorter)
    return spellings


def _white_runs(data: bytes) -> dict[int, tuple[int, int]]:
    """Return for the place of every white character where its run ends, and how many characters of it are left."""
    runs: dict[int, tuple[int, int]] = {}
    text, place = data.decode("utf-8", "replace"), len(data)
    end, letters = place, 0
    # From behind, so that the end of a run is known where it begins.
    for letter in reversed(text):
        place -= len(letter.encode("utf-8"))
        if letter.isspace():
            letters += 1
            runs[place] = (end, letters)
        else:
            end, letters = place, 0
    return runs


def _ends(
    added: Added | None,
    spellings: tuple[bytes, ...],
    data: bytes,
    runs: dict[int, tuple[int, int]],
    places: list[int],
) -> dict[int, int]:
    """Return where a token may end that begins at one of the places, the likeliest first, and at which it began."""
    # 1. Where it may begin, white space before it included, and from which place that was reached first.
    before, after = (runs if added and added.lstrip else {}), (runs if added and added.rstrip else {})
    begins: dict[int, int] = {}
    for place in places:
        _reach(begins, before, data, place, place)
    # 2. Where it may end.
    ends: dict[int, int] = {}
    for begin, place in begins.items():
        for spelling in spellings:
            if data.startswith(spelling, begin):
                _reach(ends, after, data, begin + len(spelling), place)
    return ends


def _reach(found: dict[int, int], runs: dict[int, tuple[int, int]], data: bytes, at: int, place: int) -> None:
    """Note that `at` is reached from a place, and how far white space of `runs` may be taken along: the furthest first.

    Where somebody was before, all that follows is known: a run is gone through once.
    """
    end, letters = runs.get(at, (at, 0))
    if letters > LONGEST_SHARED:
        found.setdefault(end, place)
        found.setdefault(at, place)
        return
    # Character by character: the bytes of one are told by its first.
    new = []
    while at <= end and at not in found:
        new.append(at)
        lead = data[at] if at < end else 0
        at += 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
    found.update(dict.fromkeys(reversed(new), place))
