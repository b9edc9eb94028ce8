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

MOST_PLACES = 1_000_000  # that are looked at for one text


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
    places, tried = [0], 0
    after_added = True  # the start of a text is where a dummy space comes, too
    for token_id in ids.tolist():
        spellings = _spellings(vocabulary, prefix, token_id, after_added, names)
        steps.append(_ends(vocabulary.added.get(token_id), spellings, data, places))
        # Many tokens that share very much white space could do so in too many ways to look at.
        tried += len(places)
        if tried > MOST_PLACES + 8 * len(ids):
            return None
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


def _ends(added: Added | None, spellings: tuple[bytes, ...], data: bytes, places: list[int]) -> dict[int, int]:
    """Return where a token may end that begins at one of the places, the likeliest first, and at which it began."""
    begins: dict[int, int] = {}
    for place in places:
        _reach(begins, data, place, place, white=added is not None and added.lstrip)
    ends: dict[int, int] = {}
    for begin, place in begins.items():
        for spelling in spellings:
            if data.startswith(spelling, begin):
                _reach(ends, data, begin + len(spelling), place, white=added is not None and added.rstrip)
    return ends


def _reach(found: dict[int, int], data: bytes, at: int, place: int, white: bool) -> None:
    """Note that `at` is reached from a place; with `white` also how far white space may be taken along from there.

    The furthest comes first. Where somebody was before, all that follows is known: a run is gone through once.
    """
    new = []
    while at not in found:
        new.append(at)
        letter = data[at : at + 4].decode("utf-8", "ignore")[:1] if white else ""
        if not letter.isspace():
            break
        at += len(letter.encode("utf-8"))
    found.update(dict.fromkeys(reversed(new), place))
