"""Contexts and their continuations in rows: what is asked of one context lies behind it, in one row. NumPy only.

Letters: R rows, L row length, K scored tokens of a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Batch, RowLayout

TOGETHER = 512  # tokens of continuations behind one context: attention grows with the square of a row

Question = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation
Row = tuple[Sequence[int], list[int]]  # a context, and the numbers of the questions whose continuations follow it


def bucket(size: int, least: int) -> int:
    """Return a size rounded up: to a multiple of `least`, and to one of four sizes from a power of two to the next."""
    step = max(least, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step


def batches_by_length(
    lengths: Sequence[int], batch_tokens: int, multiple: int = 1, room: int = 0
) -> list[tuple[int, int, list[int]]]:
    """Return R, L and the places of every batch, the longest first: a lack of memory shows at once.

    R is a power of two, rounded up to a multiple of the devices: as many rows of L and `room` more tokens as
    `batch_tokens` hold, fewer where fewer are left.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = []
    while order:
        length = bucket(lengths[order[0]], 16)
        fit = min(max(1, batch_tokens // (length + room)), 2 * len(order) - 1)
        count = -(-(1 << (fit.bit_length() - 1)) // multiple) * multiple
        batches.append((count, length, order[:count]))
        order = order[count:]
    return batches


def shared_rows(questions: Sequence[Question], longest: int) -> list[Row]:
    """Return the rows in which the questions of one context lie together.

    Raises:
        UserError: a continuation without a token, or with more than `longest`, the model's positions.
    """
    # 1. Same contexts. The last token is a target alone; what is too long loses its beginning.
    shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, continuation) in enumerate(questions):
        size = len(continuation)
        if not 0 < size <= longest:
            raise UserError(f"A continuation has {size} tokens; it needs one, and the model has {longest} positions.")
        shared[tuple(context[-(longest + 1 - size) :])].append(number)
    # 2. As many of their continuations as a row shall have, at least one.
    rows: list[Row] = []
    for start, numbers in shared.items():
        used = TOGETHER
        for number in numbers:
            size = len(questions[number][1])
            if used + size > TOGETHER:
                rows.append((start, []))
                used = 0
            rows[-1][1].append(number)
            used += size
    return rows


def needs_of(row: Row, questions: Sequence[Question]) -> tuple[int, int]:
    """Return how many tokens a row has, and how many of its questions' are scored."""
    scored = sum(len(questions[number][1]) for number in row[1])
    return len(row[0]) + scored - len(row[1]), scored


def build_rows(rows: Sequence[Row], questions: Sequence[Question], shape: tuple[int, int, int]) -> Batch:
    """Lay rows out in arrays of the shape (R, L, K). Their `pair` is the number of the question."""
    count, length, slots = shape
    tokens, positions, segment, parent = np.zeros((4, count, length), np.int32)
    predictor, target, side, pair = np.zeros((4, count, slots), np.int32)
    pair -= 1
    for place, (context, numbers) in enumerate(rows):
        # 1. The context is a segment of its own.
        start = end = len(context)
        tokens[place, :end], positions[place, :end], segment[place, :end] = context, np.arange(end), 1
        # 2. Each continuation sees it and itself, and all begin at the same position.
        slot = 0
        for number in numbers:
            continuation = questions[number][1]
            inner, size = len(continuation) - 1, len(continuation)
            own, scored = np.s_[place, end : end + inner], np.s_[place, slot : slot + size]
            tokens[own], positions[own], segment[own] = continuation[:-1], start + np.arange(inner), slot + 2
            predictor[scored] = [start - 1, *range(end, end + inner)]
            target[scored], pair[scored] = continuation, number
            end, slot = end + inner, slot + size
        parent[place, :end] = 1
    # 3. What training needs besides.
    none, layout = np.zeros((1, 2), np.float32), RowLayout(positions, segment, parent)
    weight = np.zeros(target.shape, np.float32)
    return Batch(tokens, layout, predictor, target, pair, side, weight, none, none, none, none[:, 0])
