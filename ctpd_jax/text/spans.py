"""Aligned spans (arXiv 2601.11865, Aligned Span Projection): two tokenizations of one text cut where both agree.

A character position c of the response is a boundary if on both sides N(text[:c]) + N(text[c:]) == N(text) and some
prefix of the tokens has exactly the bytes N(text[:c]). Spans are the stretches between consecutive boundaries, so
every token lies in exactly one of them or past the last common boundary (span id -1), and no side of a span is empty.

Letters: n characters, B bytes of a text, T tokens of one side, S spans. NumPy throughout, no loop over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Aligned, Counters, TokenSide
from ctpd_jax.text import tokens
from ctpd_jax.text.cuts import code_points, per_character, utf8_lengths
from ctpd_jax.text.shown import spans_html
from ctpd_jax.text.spelling import Spelt
from ctpd_jax.text.tokens import TextTokenizer, load_tokenizer, normalize

Unit = Literal["character", "byte"]


def align(
    response: str,
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    unit: Unit = "character",
    teacher_context: str = "",
    student_context: str = "",
    counters: Counters | None = None,
) -> Aligned:
    """Tokenize a response with two tokenizers and cut it into aligned spans.

    Args:
      teacher_tokenizer, student_tokenizer: a folder, a hub name, a transformers fast tokenizer, or what
        `load_tokenizer` returned (objects are tried once).
      unit: "character", or "byte" to cut inside characters too where the normalisers leave them alone.
      teacher_context, student_context: the text before the response. It is encoded apart and does not change the
        result; where encoding it together with the response would merge across the border, `counters` gets
        "teacher_border_merges" or "student_border_merges".

    Returns:
      The spans; neither BOS nor end-of-turn is added. A notebook shows them as boxes.

    Raises:
      UserError: a tokenizer is not lossless.
    """
    teacher, student = load_tokenizer(teacher_tokenizer), load_tokenizer(student_tokenizer)
    if counters is not None:
        counters.add("teacher_border_merges", tokens.merges_across(teacher, [teacher_context], [response]))
        counters.add("student_border_merges", tokens.merges_across(student, [student_context], [response]))
    shown = partial(spans_html, response=response, teacher=teacher, student=student)
    return replace(align_batch([response], teacher, student, unit)[0], html=shown)


def align_batch(responses: Sequence[str], teacher: Any, student: Any, unit: Unit = "character") -> list[Aligned]:
    """Do `align` for several responses, tokenized together."""
    teacher, student = load_tokenizer(teacher), load_tokenizer(student)
    own = tokens.spell_batch(teacher, responses)
    other = own if teacher.fingerprint == student.fingerprint else tokens.spell_batch(student, responses)
    return [
        _align(response, _Side(teacher, a), _Side(student, b), unit) for response, a, b in zip(responses, own, other)
    ]


def align_ids(
    response: str,
    teacher: TextTokenizer,
    teacher_ids: np.ndarray,
    student: TextTokenizer,
    student_ids: np.ndarray,
    unit: Unit = "character",
) -> Aligned:
    """Cut two given tokenizations of a response, int [Tt] and int [Ts], into aligned spans.

    Either may stop before the response does; tokens past the last common boundary get span id -1.
    Raises UserError if the ids do not spell the response.
    """

    def spelt(tok: TextTokenizer, ids: np.ndarray) -> Spelt:
        normalized = normalize(tok, response)
        return Spelt(np.asarray(ids, np.int32), tokens.byte_ends(tok, ids, normalized), normalized)

    sides = _Side(teacher, spelt(teacher, teacher_ids)), _Side(student, spelt(student, student_ids))
    return _align(response, *sides, unit)


def _align(response: str, teacher: _Side, student: _Side, unit: Unit) -> Aligned:
    """Cut two tokenizations of a response, spelt out, into aligned spans."""
    if unit not in ("character", "byte"):
        raise UserError(f"Unknown span unit {unit!r}: use 'character' or 'byte'.")
    # 1. Where the text can be cut at all: in its own bytes, and in those of both normalised texts.
    sides = teacher, student
    lengths = utf8_lengths(code_points(response))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    cuts = [tokens.cut_offsets(side.tok, response, side.normalized) for side in sides]
    if unit == "byte":
        cuts = [_cuts_in_bytes(response, lengths, side, own) for side, own in zip(sides, cuts)]
        offsets = np.arange(offsets[-1] + 1)
    # 2. Where both tokenizations end a token there.
    shared = sides[0].has_end(cuts[0]) & sides[1].has_end(cuts[1])
    # 3. The span of each token.
    return Aligned(
        bounds=offsets[shared].astype(np.int32),
        teacher=TokenSide(sides[0].ids, sides[0].span_ids(cuts[0][shared])),
        student=TokenSide(sides[1].ids, sides[1].span_ids(cuts[1][shared])),
    )


class _Side:
    """One tokenization, in offsets of its own normalised text."""

    def __init__(self, tok: TextTokenizer, spelt: Spelt) -> None:
        self.tok = tok
        self.ids, self.ends, self.normalized = spelt
        self.ends_here = np.zeros(len(self.normalized.encode("utf-8")) + 1, bool)  # [B + 1]
        self.ends_here[0] = True
        self.ends_here[self.ends] = True

    def has_end(self, cuts: np.ndarray) -> np.ndarray:
        return (cuts >= 0) & self.ends_here[np.maximum(cuts, 0)]

    def span_ids(self, positions: np.ndarray) -> np.ndarray:
        """Return the span of each token, int32 [T], from the boundaries in normalised bytes, [S + 1]."""
        inner = positions[1:]
        spans = np.searchsorted(inner, self.ends, side="left")
        # A token without bytes belongs to what follows it; at the end of the text, to the last span.
        empty = np.diff(self.ends, prepend=0) == 0
        if empty.any():
            following = np.searchsorted(inner, self.ends, side="right")
            spans = np.where(empty & (self.ends < positions[-1]), following, spans)
        return np.where(self.ends <= positions[-1], np.minimum(spans, len(inner) - 1), -1).astype(np.int32)


def _cuts_in_bytes(text: str, lengths: np.ndarray, side: _Side, cuts: np.ndarray) -> np.ndarray:
    """Return for each byte of the text its offset in N(text), -1 where it is no clean cut: [n + 1] -> [B + 1].

    A position inside a character is one where both the character's edges are and its bytes stand in N(text) unchanged.
    """
    if side.normalized == text:
        return np.arange(cuts[-1] + 1)
    unchanged = per_character(code_points(text), lambda character: normalize(side.tok, character) == character, bool)
    base = np.where((cuts[:-1] >= 0) & (cuts[1:] >= 0) & unchanged, cuts[:-1], -1)
    character = np.repeat(np.arange(len(lengths)), lengths)  # of each byte
    within = np.arange(len(character)) - (np.cumsum(lengths) - lengths)[character]
    inner = np.where(base[character] >= 0, base[character] + within, -1)
    return np.append(np.where(within == 0, cuts[character], inner), cuts[-1])


def truncate(aligned: Aligned, max_teacher_tokens: int, max_student_tokens: int) -> tuple[Aligned, bool]:
    """Cut both sides at the last common boundary that fits both limits.

    Returns what is left, where every token lies in a span, and whether any token was dropped.
    """
    spans = aligned.num_spans
    for side, limit in ((aligned.teacher, max_teacher_tokens), (aligned.student, max_student_tokens)):
        # Span ids do not decrease, so the tokens up to span k are those before the first id above k.
        inside = side.span_ids[side.span_ids >= 0]
        counts = np.searchsorted(inside, np.arange(aligned.num_spans), side="right")
        spans = min(spans, int(np.searchsorted(counts, limit, side="right")))
    # Of both sides what lies in those spans; a token past the last boundary goes too.
    kept, dropped = [], False
    for side in (aligned.teacher, aligned.student):
        keep = (side.span_ids >= 0) & (side.span_ids < spans)
        kept.append(TokenSide(side.ids[keep], side.span_ids[keep]))
        dropped |= not keep.all()
    return Aligned(aligned.bounds[: spans + 1], kept[0], kept[1]), bool(dropped)


def with_end_of_turn(aligned: Aligned, teacher_token: int, student_token: int) -> Aligned:
    """Pair the two end-of-turn tokens by role, as one last span of no bytes (bounds repeats its last value).

    Only for a response of which `truncate` has dropped nothing: one that was cut must not teach the student to stop in
    mid-sentence.
    """
    sides = []
    for side, token in ((aligned.teacher, teacher_token), (aligned.student, student_token)):
        ids = np.append(side.ids, np.int32(token))
        sides.append(TokenSide(ids, np.append(side.span_ids, np.int32(aligned.num_spans))))
    return Aligned(np.append(aligned.bounds, aligned.bounds[-1]), sides[0], sides[1])
