"""Aligned spans (arXiv 2601.11865, Aligned Span Projection): two tokenizations of one text cut where both agree.

A character position c of the response is a boundary if on both sides N(text[:c]) + N(text[c:]) == N(text) and some
prefix of the tokens has exactly the bytes N(text[:c]). Spans are the stretches between consecutive boundaries, so
every token lies in exactly one of them or past the last common boundary (span id -1), and no side of a span is empty.

Letters: n characters, B bytes of a text, T tokens of one side, S spans. NumPy throughout, no loop over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Aligned, Counters, TokenSide
from ctpd_jax.text.cuts import code_points, per_character, utf8_lengths
from ctpd_jax.text.tokens import (
    TextTokenizer,
    byte_ends,
    cut_offsets,
    encode_batch,
    load_tokenizer,
    merges_across,
    normalize,
)

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

    teacher_tokenizer, student_tokenizer: a folder, a hub name, a transformers fast tokenizer, or what
        `load_tokenizer` returned (objects are probed once).
    unit: "character", or "byte" to cut inside characters too where the normalisers leave them alone.
    teacher_context, student_context: the text before the response. It is encoded apart and does not change the
        result; where encoding it together with the response would merge across the border, `counters` gets
        "teacher_border_merges" or "student_border_merges".

    Neither BOS nor end-of-turn is added. Raises UserError for a tokenizer that is not lossless.
    """
    teacher, student = load_tokenizer(teacher_tokenizer), load_tokenizer(student_tokenizer)
    if counters is not None:
        counters.add("teacher_border_merges", merges_across(teacher, [teacher_context], [response]))
        counters.add("student_border_merges", merges_across(student, [student_context], [response]))
    return align_batch([response], teacher, student, unit)[0]


def align_batch(responses: Sequence[str], teacher: Any, student: Any, unit: Unit = "character") -> list[Aligned]:
    """`align` of several responses, tokenized together."""
    teacher, student = load_tokenizer(teacher), load_tokenizer(student)
    teacher_ids = encode_batch(teacher, responses)
    same = teacher.fingerprint == student.fingerprint
    student_ids = teacher_ids if same else encode_batch(student, responses)
    return [
        align_ids(response, teacher, t_ids, student, s_ids, unit)
        for response, t_ids, s_ids in zip(responses, teacher_ids, student_ids)
    ]


def align_ids(
    response: str,
    teacher: TextTokenizer,
    teacher_ids: np.ndarray,
    student: TextTokenizer,
    student_ids: np.ndarray,
    unit: Unit = "character",
) -> Aligned:
    """Aligned spans of two given tokenizations of a response, int [Tt] and int [Ts].

    Either may stop before the response does; tokens past the last common boundary get span id -1.
    Raises UserError if the ids do not spell the response.
    """
    if unit not in ("character", "byte"):
        raise UserError(f"Unknown span unit {unit!r}: use 'character' or 'byte'.")
    teacher_side = _Side(response, teacher, teacher_ids)
    student_side = _Side(response, student, student_ids)
    if teacher_side.identity and student_side.identity:
        # Both normalisers leave this text alone: one offset in bytes serves everything.
        offsets = np.flatnonzero(teacher_side.ends_here & student_side.ends_here)
        if unit == "character":
            text_bytes = np.frombuffer(response.encode("utf-8"), np.uint8)
            offsets = offsets[(offsets == len(text_bytes)) | _starts_character(text_bytes, offsets)]
        positions = teacher_positions = student_positions = offsets
    else:
        raw, teacher_cuts, student_cuts = _shared_positions(response, teacher_side, student_side, unit)
        shared = teacher_side.has_end(teacher_cuts) & student_side.has_end(student_cuts)
        positions, teacher_positions, student_positions = raw[shared], teacher_cuts[shared], student_cuts[shared]
    return Aligned(
        bounds=positions.astype(np.int32),
        teacher=TokenSide(teacher_side.ids, teacher_side.span_ids(teacher_positions)),
        student=TokenSide(student_side.ids, student_side.span_ids(student_positions)),
    )


class _Side:
    """One tokenization, in offsets of its own normalised text."""

    def __init__(self, text: str, tok: TextTokenizer, ids: np.ndarray) -> None:
        normalized = normalize(tok, text)
        self.text, self.tok = text, tok
        self.ids = np.asarray(ids, np.int32)
        self.identity = normalized == text
        self.ends = byte_ends(tok, self.ids, normalized)  # int64 [T]
        self.ends_here = np.zeros(len(normalized.encode("utf-8")) + 1, bool)  # [B + 1]
        self.ends_here[0] = True
        self.ends_here[self.ends] = True

    def has_end(self, cuts: np.ndarray) -> np.ndarray:
        return (cuts >= 0) & self.ends_here[np.maximum(cuts, 0)]

    def span_ids(self, positions: np.ndarray) -> np.ndarray:
        """The boundaries in normalised bytes, [S + 1] -> the span of each token, int32 [T]."""
        inner = positions[1:]
        spans = np.searchsorted(inner, self.ends, side="left")
        # A token without bytes belongs to what follows it; at the end of the text, to the last span.
        starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]]) if len(self.ends) else self.ends
        empty = self.ends == starts
        if empty.any():
            following = np.searchsorted(inner, self.ends, side="right")
            spans = np.where(empty & (self.ends < positions[-1]), following, spans)
        return np.where(self.ends <= positions[-1], np.minimum(spans, len(inner) - 1), -1).astype(np.int32)


def _starts_character(text_bytes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether a character starts at each offset below the end: its byte is no continuation byte of UTF-8."""
    inside = np.minimum(offsets, max(len(text_bytes) - 1, 0))
    return (text_bytes[inside] & 0xC0) != 0x80 if len(text_bytes) else np.zeros(len(offsets), bool)


def _shared_positions(
    text: str, teacher: _Side, student: _Side, unit: Unit
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates for boundaries: raw byte offsets, and the offsets in both normalised texts (-1: no clean cut)."""
    lengths = utf8_lengths(code_points(text))
    raw = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    cuts = [cut_offsets(side.tok, text) for side in (teacher, student)]
    if unit == "character":
        return raw, cuts[0], cuts[1]
    # Bytes: position k inside a character counts where both its edges are clean and it is left as it is.
    character = np.repeat(np.arange(len(lengths)), lengths)  # of each raw byte
    within = np.arange(len(character)) - raw[character]
    in_bytes = []
    for side, side_cuts in zip((teacher, student), cuts):
        base = _unchanged_at(text, side_cuts, side.tok)[character]
        inner = np.where(base >= 0, base + within, -1)
        in_bytes.append(np.append(np.where(within == 0, side_cuts[character], inner), side_cuts[-1]))
    return np.arange(len(character) + 1), in_bytes[0], in_bytes[1]


def _unchanged_at(text: str, cuts: np.ndarray, tok: TextTokenizer) -> np.ndarray:
    """For each character its offset in the normalised text if its bytes stand there unchanged, else -1: [n]."""
    unchanged = per_character(code_points(text), lambda character: normalize(tok, character) == character, bool)
    clean = (cuts[:-1] >= 0) & (cuts[1:] >= 0)
    return np.where(clean & unchanged, cuts[:-1], -1)


# ------------------------------------------------------------------------------------------------ changes


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
    sides = [
        TokenSide(side.ids[keep], side.span_ids[keep])
        for side in (aligned.teacher, aligned.student)
        for keep in [(side.span_ids >= 0) & (side.span_ids < spans)]
    ]
    dropped = any(len(new.ids) < len(old.ids) for new, old in zip(sides, (aligned.teacher, aligned.student)))
    return Aligned(aligned.bounds[: spans + 1], sides[0], sides[1]), dropped


def with_end_of_turn(aligned: Aligned, teacher_token: int, student_token: int) -> Aligned:
    """Pair the two end-of-turn tokens by role, as one last span of no bytes (bounds repeats its last value).

    Only for a response that was not truncated: one that was must not teach the student to stop in mid-sentence.
    """

    def closed(side: TokenSide, token: int) -> TokenSide:
        if (side.span_ids < 0).any():
            raise UserError("A response that was cut has no end of turn: truncate it and leave the token out.")
        return TokenSide(
            np.append(side.ids, np.int32(token)).astype(np.int32),
            np.append(side.span_ids, np.int32(aligned.num_spans)).astype(np.int32),
        )

    return Aligned(
        np.append(aligned.bounds, aligned.bounds[-1]).astype(np.int32),
        closed(aligned.teacher, teacher_token),
        closed(aligned.student, student_token),
    )
