"""What a teacher that is not here makes of responses: from a server that returns prompt log-probabilities, or a table.

Both give one number for every response token. Token ids are compared with ours: another tokenizer, or a server that
puts a token before the prompt, would give numbers of other tokens.
Letters: P prompt tokens; T tokens of a response, S of its spans.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests

from ctpd_jax.errors import UserError
from ctpd_jax.processes import server
from ctpd_jax.schema import SIDES, AlignedPair

ABOVE_ZERO = 1e-3  # a log-probability may be so much more, by rounding


def asked_logps(
    session: requests.Session, url: str, model: str, prompt: np.ndarray, response: np.ndarray
) -> np.ndarray:
    """Return the log-probability of every response token, float32 [T], by a server that answers as vLLM does.

    `prompt` and `response` are token ids, int32 [P] and [T].

    Raises:
        UserError: the server does not answer, or not with the log-probabilities of these tokens.
    """
    ids = [*prompt.tolist(), *response.tolist()]
    # One token has to be drawn. 1 is asked for, as 0 stands for "none" in some servers; ours is always among them.
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    reply = server.asked(session, url, "completions", body)
    try:
        listed = reply["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        listed = None
    if not isinstance(listed, list):
        raise UserError(
            f"{url} answers without prompt_logprobs; it has to be a server that returns them for completions of token "
            f"ids, as vLLM's does: {json.dumps(reply)[:200]}"
        )
    if len(listed) != len(ids):
        raise UserError(f"{url} was sent {len(ids)} tokens and tells of {len(listed)}: it reads another prompt.")
    values = np.empty(len(response), np.float32)
    for place in range(len(prompt), len(ids)):
        entry = listed[place]
        try:
            values[place - len(prompt)] = entry[str(ids[place])]["logprob"]
        except (KeyError, TypeError, ValueError):
            told = ", ".join(entry) if isinstance(entry, dict) else entry
            raise UserError(
                f"{url} was sent token {ids[place]} at place {place} and tells of {told}: it has another tokenizer."
            ) from None
    return values


def summed(what: str, values: Any, span_ids: np.ndarray) -> np.ndarray:
    """Return the sums over the spans, float32 [S], of one number a token [T]; of one a span, those numbers.

    Where there are as many spans as tokens both are the same. `what` names the response, for what is refused.

    Raises:
        UserError: another count, or a number that is no log-probability.
    """
    found: np.ndarray = np.asarray(values, np.float64)
    spans = int(span_ids[-1]) + 1
    if found.shape not in ((len(span_ids),), (spans,)):
        raise UserError(f"{what}: {found.size} log-probabilities for {len(span_ids)} tokens in {spans} spans.")
    if not np.isfinite(found).all() or (found > ABOVE_ZERO).any():
        wrong = found[~(np.isfinite(found) & (found <= ABOVE_ZERO))][0]
        raise UserError(f"{what}: {wrong} is no log-probability; it has to be finite, and at most 0.")
    if len(found) != spans:
        found = np.bincount(span_ids, found, spans)
    return found.astype(np.float32)


class Table:
    """A Parquet file, or a folder of them, with the log-probabilities that somebody else has measured.

    A row a pair: `id`; `chosen_teacher_ids` and `rejected_teacher_ids`, lists of token ids; and for each name in
    `columns` `chosen_NAME` and `rejected_NAME`, lists of one number for every token, or one for every span. Where a
    prompt's ids are there they are compared too: `teacher_prompt`, or `NAME_prompt` behind an instruction.

    Raises:
        UserError: there is no such file, it is none of Parquet, or it lacks a column.
    """

    def __init__(self, path: str | Path, columns: Sequence[str]) -> None:
        import pyarrow
        import pyarrow.parquet

        # 1. What has to be there, and what is compared if it is.
        self.path = Path(path).expanduser()
        needed = ["id", *(f"{side}_{what}" for side in SIDES for what in ("teacher_ids", *columns))]
        if not self.path.exists():
            raise UserError(f"There is no table {self.path}: config.annotate.table names a Parquet file.")
        try:
            there = pyarrow.parquet.ParquetDataset(self.path).schema
            if missing := [name for name in needed if name not in there.names]:
                raise UserError(f"{self.path} has no column {missing[0]}; it has {', '.join(there.names)}.")
            needed += [
                name for name in ("teacher_prompt", *(f"{one}_prompt" for one in columns)) if name in there.names
            ]
            for name in needed[1:]:
                of = getattr(there.field(name).type, "value_type", pyarrow.null())
                if not (pyarrow.types.is_integer(of) or pyarrow.types.is_floating(of)):
                    raise UserError(f"{self.path}: {name} holds {there.field(name).type}, not lists of numbers.")
            self.rows = pyarrow.parquet.read_table(self.path, columns=needed)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        # 2. Where each pair's row is.
        self.places: dict[str, int] = {}
        for place, one in enumerate(self.rows.column("id").to_pylist()):
            if self.places.setdefault(str(one), place) != place:
                raise UserError(f"{self.path} has two rows of pair {one}.")

    def logps(self, pair: AlignedPair, column: str, prompt: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return what a column holds of a pair's chosen and rejected spans, float32 [S] each.

        `prompt` is what the column's model reads before the responses, int32 [P]; None where it is the pair's own.

        Raises:
            UserError: the pair is not there, or other tokens, or what is no log-probability.
        """
        place = self.places.get(pair.id)
        if place is None:
            raise UserError(f"{self.path} has no row of pair {pair.id}; `ctpd table` writes the pairs that are needed.")
        read, own = ("teacher_prompt", pair.teacher_prompt) if prompt is None else (f"{column}_prompt", prompt)
        self._same(pair, place, read, own)
        found = []
        for side, name in enumerate(SIDES):
            tokens = pair.tokens("teacher", side)
            self._same(pair, place, f"{name}_teacher_ids", tokens.ids)
            values, what = self._list(place, f"{name}_{column}"), f"{self.path}: {name}_{column} of pair {pair.id}"
            found.append(summed(what, values, tokens.span_ids))
        return found[0], found[1]

    def _list(self, place: int, name: str) -> np.ndarray:
        found = self.rows.column(name)[place]
        return found.values.to_numpy(zero_copy_only=False) if found.is_valid else np.zeros(0)

    def _same(self, pair: AlignedPair, place: int, name: str, ids: np.ndarray) -> None:
        if name not in self.rows.column_names:  # of a prompt
            return
        told = self._list(place, name)
        if not np.array_equal(told, ids):
            differ = next((i for i, (a, b) in enumerate(zip(told, ids)) if a != b), min(len(told), len(ids)))
            raise UserError(
                f"{self.path}: {name} of pair {pair.id} are not the teacher's tokens here, from place {differ} of "
                f"{len(ids)} on: another tokenizer, chat template or limit. `ctpd table` writes those that are needed."
            )
