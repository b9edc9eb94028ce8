"""What travels between the rooms: every record, with the shape, dtype and meaning of its arrays.

Letters: T tokens of one side, S spans, R rows of a batch, L row length, K scored tokens of a row, P pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from ctpd_jax.errors import printable

Array = Any  # a jax.Array or a numpy.ndarray: the records below travel on the host and on devices alike

Model = Literal["teacher", "student"]
MODELS: tuple[Model, Model] = ("teacher", "student")

CHOSEN, REJECTED = 0, 1
SIDES = ("chosen", "rejected")


# ------------------------------------------------------------------------------------------------ text


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class PreferencePair:
    """One preference: a conversation and two answers to its last turn, the texts exactly as they came."""

    id: str  # unique in its data set, stable across runs
    prompt: tuple[Message, ...]  # everything before the answers; empty for an unconditional text
    chosen: str
    rejected: str
    source: str = ""  # where it stands, for messages: "train.jsonl:17"
    weight: float = 1.0  # how much it counts in training on pairs
    margin: float | None = None  # by how much the chosen answer is the better one, in the data's own unit


# ------------------------------------------------------------------------------------------------ spans


@dataclass(frozen=True)
class TokenSide:
    """One tokenizer's view of a response."""

    ids: np.ndarray  # int32 [T]
    span_ids: np.ndarray  # int32 [T]: 0..S-1, not decreasing; -1 past the last common boundary


@dataclass(frozen=True)
class Aligned:
    """One response cut at the boundaries that both tokenizations share.

    Span i covers the bytes bounds[i]:bounds[i+1] of response.encode("utf-8"). An end-of-turn span covers none:
    bounds then repeats its last value.
    """

    bounds: np.ndarray  # int32 [S+1], bounds[0] == 0
    teacher: TokenSide
    student: TokenSide
    html: Callable[[Aligned], str] | None = field(default=None, repr=False, compare=False)  # `align` knows the texts

    def _repr_html_(self) -> str | None:
        """Show the spans in a notebook."""
        return None if self.html is None else self.html(self)

    @property
    def num_spans(self) -> int:
        return len(self.bounds) - 1


@dataclass(frozen=True)
class AlignedPair:
    """A preference pair ready for both models: prompts as token ids, responses aligned, cut and closed.

    Every response token here lies in a span: what truncation left over is gone.
    """

    id: str
    teacher_prompt: np.ndarray  # int32 [Tp], BOS and template included
    student_prompt: np.ndarray  # int32 [Tq]
    chosen: Aligned
    rejected: Aligned
    chosen_bytes: int  # length of the whole response, in bytes of UTF-8
    rejected_bytes: int
    truncated: tuple[bool, bool] = (False, False)  # chosen, rejected
    dropped: int = 0  # characters cut from the left of the last user message
    weight: float = 1.0  # as in PreferencePair
    margin: float | None = None

    def response(self, side: int) -> Aligned:
        return self.chosen if side == CHOSEN else self.rejected

    def prompt(self, model: Model) -> np.ndarray:
        return self.teacher_prompt if model == "teacher" else self.student_prompt

    def tokens(self, model: Model, side: int) -> TokenSide:
        aligned = self.response(side)
        return aligned.teacher if model == "teacher" else aligned.student


# ------------------------------------------------------------------------------------------------ rows


class RowLayout(NamedTuple):
    """Which token of a row sees which. All int32 [R, L].

    A token sees the earlier tokens of its row whose `segment` equals its own segment or its `parent`.
    Segment 0 is padding and is seen by nobody. A response that carries its own prompt has parent == segment; with
    prompt sharing the prompt is a segment of its own and the parent of both responses.
    """

    positions: Array
    segment: Array
    parent: Array


class SpanSlots(NamedTuple):
    """Spans of a batch, laid beside its scored tokens. All [R, K]."""

    span: Array  # int32: the number of the slot's span in its row, 0..K-1; -1 in padding
    target: Array  # float32: what the span's log-probability shall come to, at each of its slots
    share: Array  # float32: 1 / the response's spans at a span's first slot, 0 at its others and in padding


class TeacherTokens(NamedTuple):
    """What the teacher makes of each row's response. U: its own tokens of the response, F: figures of each."""

    features: Array  # float32 [R, U, F]: its largest probabilities in descending order, or its last hidden state
    inputs: Array  # int32 [R, U]: the teacher's token before, on which the prediction stands
    targets: Array  # int32 [R, U]: the teacher's token
    real: Array  # bool [R, U]


class Batch(NamedTuple):
    """Rows of tokens, and the tokens in them that are scored. A JAX pytree of static shapes.

    Slot k of row r says: the hidden state at row position predictor[r, k] is scored against target[r, k], the token
    belongs to answer side[r, k] of pair[r, k] and its log-probability counts weight[r, k] times in the return.
    """

    tokens: Array  # int32 [R, L]
    layout: RowLayout  # int32 [R, L] each
    predictor: Array  # int32 [R, K]; 0 in padding
    target: Array  # int32 [R, K]; 0 in padding
    pair: Array  # int32 [R, K]; -1 in padding
    side: Array  # int32 [R, K]; 0 chosen, 1 rejected
    weight: Array  # float32 [R, K]; 0 in padding
    constant: Array  # float32 [P, 2]: c(y) of method, the reference's share of the return
    start: Array  # float32 [P, 2]: log-probability under the model's own start, every token counting one; NaN: unknown
    reference: Array  # float32 [P, 2]: the same of the reference, 0 without one
    real: Array  # float32 [P]: 1 for a pair, 0 for padding of the last batch
    # What some objectives need besides, and else None.
    label: Array | None = None  # float32 [P]: probability that the chosen response is the better one
    pair_weight: Array | None = None  # float32 [P]: how much the pair counts
    spans: SpanSlots | None = None  # [R, K] each: what the spans of span regression shall come to
    teacher: TeacherTokens | None = None  # [R, U, ...]: for distillation, where a row is a response

    def per_pair(self) -> tuple[str, ...]:
        """The fields that belong to pairs; the others have a row for their first axis."""
        names = ("constant", "start", "reference", "real", "label", "pair_weight")
        return tuple(name for name in names if getattr(self, name) is not None)


# ------------------------------------------------------------------------------------------------ reports


@dataclass
class Counters:
    """What was cut, dropped, escaped or merged on the way; printed and logged, never silent.

    A count that begins with "left out: " is a reason for which rows or pairs cannot be used.
    """

    counts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)  # where a count was met first; names of columns

    def add(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + int(number)

    def note(self, name: str, what: str, most: int = 3) -> None:
        """Keeps the first few things that were met under a name."""
        noted, what = self.notes.setdefault(name, []), printable(what)
        if len(noted) < most and what not in noted:
            noted.append(what)

    def leave_out(self, reason: str, where: str, detail: str = "") -> None:
        """Counts a row or pair that cannot be used; keeps where the first ones stand, and the first one's detail."""
        self.add(reason)
        told = f"{where}: {detail}" if detail and reason not in self.notes else where
        self.note(reason, told)

    def merge(self, other: Counters) -> None:
        for name, number in other.counts.items():
            self.add(name, number)
        for name, noted in other.notes.items():
            for what in noted:
                self.note(name, what)

    def __getitem__(self, name: str) -> int:
        return self.counts.get(name, 0)

    @property
    def left_out(self) -> dict[str, int]:
        """The reasons, the most frequent first."""
        found = {name: number for name, number in self.counts.items() if name.startswith("left out: ")}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def reasons(self) -> str:
        """The table of reasons, with the first rows of each."""
        lines = (f"{name}: {number:,}{self.first(name)}" for name, number in self.left_out.items())
        return "\n  ".join(lines)

    def first(self, name: str) -> str:
        return f" ({'; '.join(self.notes[name])})" if name in self.notes else ""
