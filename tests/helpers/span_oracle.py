"""Aligned spans straight from their definition, with prefixes and loops; nothing here comes from the library.

Slow on purpose. It needs the ids and the vocabulary of a tokenizer, the canonical form of its normaliser, and
whether it writes spaces as a marker.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

MARKER = "\u2581"


@dataclass
class Reference:
    """One tokenizer as its tokenizer.json describes it."""

    backend: Any  # tokenizers.Tokenizer
    form: str | None

    @cached_property
    def state(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @cached_property
    def byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(self.state["pre_tokenizer"])

    @cached_property
    def added(self) -> dict[int, str]:
        return {token["id"]: token["content"] for token in self.state["added_tokens"]}

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
        letters = {chr(b): b for b in shown}
        hidden = [b for b in range(256) if b not in shown]
        return letters | {chr(256 + i): b for i, b in enumerate(hidden)}

    def normal(self, text: str) -> bytes:
        if self.form:
            text = unicodedata.normalize(self.form, text)
        return (text if self.byte_level else text.replace(MARKER, " ")).encode()

    def token(self, token_id: int) -> bytes:
        if token_id in self.added:
            text = self.added[token_id]
            return text.encode() if self.byte_level else text.replace(MARKER, " ").encode()
        piece = self.backend.id_to_token(token_id)
        if self.byte_level:
            return bytes(self._alphabet[letter] for letter in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(MARKER, " ").encode()

    def prefixes(self, text: str, ids: Any) -> list[bytes]:
        """The bytes of the first 0, 1, ... tokens, a dummy space in front counted as nothing."""
        pieces = [self.token(int(i)) for i in ids]
        spelled, normal = b"".join(pieces), self.normal(text)
        dummy = spelled != normal[: len(spelled)]
        if dummy:
            assert spelled[:1] == b" " and spelled[1:] == normal[: len(spelled) - 1]
            pieces[0] = pieces[0][1:]
        result = [b""]
        for piece in pieces:
            result.append(result[-1] + piece)
        return result


def oracle(
    text: str, teacher: Reference, teacher_ids: Any, student: Reference, student_ids: Any, unit: str
) -> tuple[list[int], list[int], list[int]]:
    """bounds, and the span ids of both sides."""
    sides = [(teacher, teacher.prefixes(text, teacher_ids)), (student, student.prefixes(text, student_ids))]
    raw = [0]
    normal = [[b""], [b""]]
    for offset, places in _candidates(text, [ref for ref, _ in sides], unit):
        if all(place in prefixes for place, (_, prefixes) in zip(places, sides)):
            raw.append(offset)
            for known, place in zip(normal, places):
                known.append(place)
    spans = [
        [_span_of(prefixes, j, [len(place) for place in known]) for j in range(len(prefixes) - 1)]
        for known, (_, prefixes) in zip(normal, sides)
    ]
    return raw, spans[0], spans[1]


def _candidates(text: str, references: list[Reference], unit: str) -> list[tuple[int, list[bytes]]]:
    """Raw byte offset and normalised prefix per side of every position that is a clean cut on both sides."""

    def clean(reference: Reference, position: int) -> bool:
        parts = reference.normal(text[:position]) + reference.normal(text[position:])
        return parts == reference.normal(text)

    both = [all(clean(reference, position) for reference in references) for position in range(len(text) + 1)]
    found = []
    for position, character in enumerate(text):
        code = character.encode()
        start = len(text[:position].encode())
        plain = all(reference.normal(character) == code for reference in references)
        if unit == "byte" and both[position] and both[position + 1] and plain:
            for k in range(1, len(code)):
                found.append((start + k, [r.normal(text[:position]) + code[:k] for r in references]))
        if both[position + 1]:
            found.append((start + len(code), [r.normal(text[: position + 1]) for r in references]))
    return found


def _span_of(prefixes: list[bytes], token: int, bounds: list[int]) -> int:
    start, end = len(prefixes[token]), len(prefixes[token + 1])
    if start == end:  # no bytes: with what follows, or with the last
        following = [i for i in range(len(bounds) - 1) if bounds[i] <= start < bounds[i + 1]]
        if following:
            return following[0]
        return len(bounds) - 2 if start == bounds[-1] else -1
    inside = [i for i in range(len(bounds) - 1) if bounds[i] <= start and end <= bounds[i + 1]]
    assert len(inside) <= 1
    return inside[0] if inside else -1


def check_aligned(aligned: Any, text: str) -> None:
    """What must hold of every alignment of two whole tokenizations, whatever the definition says."""
    bounds = aligned.bounds
    assert bounds.dtype == np.int32 and bounds[0] == 0
    assert (np.diff(bounds) > 0).all()
    assert bounds[-1] == len(text.encode()), "whole tokenizations agree at the end of the text"
    for side in (aligned.teacher, aligned.student):
        assert side.ids.dtype == np.int32 and side.span_ids.dtype == np.int32
        assert side.ids.shape == side.span_ids.shape
        assert (np.diff(side.span_ids) >= 0).all()
        assert set(side.span_ids.tolist()) == set(range(aligned.num_spans)), "every span has tokens, every token a span"


def check_against_oracle(aligned: Any, text: str, teacher: Reference, student: Reference, unit: str) -> None:
    expected = oracle(text, teacher, aligned.teacher.ids, student, aligned.student.ids, unit)
    found = (aligned.bounds, aligned.teacher.span_ids, aligned.student.span_ids)
    assert [array.tolist() for array in found] == list(expected)
