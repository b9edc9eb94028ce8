"""What a teacher that is not here makes of responses: from a server that returns prompt log-probabilities, or a table.

Both give one number for every response token. Token ids are compared with ours: another tokenizer, or a server that
puts a token before the prompt, would give numbers of other tokens.
Letters: P prompt tokens; T tokens of a response, S of its spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import requests

from ctpd_jax.buckets.objects import at_hand
from ctpd_jax.errors import UserError, printable
from ctpd_jax.processes import server
from ctpd_jax.schema import SIDES, AlignedPair

ABOVE_ZERO = 1e-3  # a log-probability may be so much more, by rounding
AS_ZERO = -9999.0  # what vLLM writes for minus infinity, which JSON has not
LARGEST = 1e30  # no sum of numbers below it leaves float32


def asked_logps(
    session: requests.Session, url: str, model: str, prompt: np.ndarray, response: np.ndarray
) -> np.ndarray:
    """Return the log-probability of every response token, float64 [T], by a server that answers as vLLM does.

    `prompt` and `response` are token ids, int32 [P] and [T].

    Raises:
        UserError: the server does not answer, or not with the log-probabilities of these tokens.
    """
    ids = [*prompt.tolist(), *response.tolist()]
    where = f"{url.rstrip('/')}/completions"
    # One token has to be drawn. 1 is asked for, as 0 stands for "none" in some servers; ours is always among them.
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    reply = server.asked(session, url, "completions", body)
    try:
        listed = reply["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        listed = None
    if not isinstance(listed, list):
        raise UserError(
            f"{where} answers without prompt_logprobs; it has to be a server that returns them for completions of "
            f"token ids, as vLLM's does: {server.shown(reply)}"
        )
    if len(listed) != len(ids):
        raise UserError(f"{where} was sent {len(ids)} tokens and tells of {len(listed)}: it reads another prompt.")
    # The prompt's ids too; before the first one stands nothing, so that it alone is not listed.
    for place, (token, entry) in enumerate(zip(ids, listed)):
        if (place or not len(prompt)) and not (isinstance(entry, dict) and str(token) in entry):
            told = printable(", ".join(entry) if isinstance(entry, dict) else str(entry))[:200]
            raise UserError(
                f"{where} was sent token {token} at place {place} and tells of {told}: it has another tokenizer, or "
                "changes what it is sent."
            )
    return np.array([_number(where, listed[i][str(ids[i])]) for i in range(len(prompt), len(ids))], np.float64)


def _number(where: str, entry: Any) -> float:
    """Return the log-probability of a token's entry; a number, and not what Python would take for one."""
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} lists {server.shown(entry)} for a token; its logprob has to be a number.")
    if not AS_ZERO < value <= ABOVE_ZERO:
        raise UserError(f"{where} lists a logprob of {server.shown(value)}; it has to be finite, and at most 0.")
    return float(value)


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
    if (wrong := found[~((np.abs(found) <= LARGEST) & (found <= ABOVE_ZERO))]).size:
        raise UserError(f"{what}: {wrong[0]} is no log-probability; it has to be finite, and at most 0.")
    if len(found) != spans:
        found = np.bincount(span_ids, found, spans)
    return found.astype(np.float32)


class Table:
    """A Parquet file, or a folder of them, with the log-probabilities that somebody else has measured.

    A row a pair: `id`; `chosen_teacher_ids` and `rejected_teacher_ids`, lists of token ids; and for each name in
    `columns` `chosen_NAME` and `rejected_NAME`, lists of one number for every token, or one for every span. What else
    says what was measured is compared where it is there: `teacher_prompt`, or `NAME_prompt` behind an instruction, and
    of numbers of spans `chosen_teacher_span_ids`.

    Raises:
        UserError: there is no such file, it is none of Parquet, or it lacks a column.
    """

    def __init__(self, path: str | Path, columns: Sequence[str]) -> None:
        import pyarrow
        import pyarrow.parquet

        # 1. What has to be there, and what is compared if it is. Numbers are read when the first one is asked for.
        self.path = at_hand(path)
        if not self.path.exists():
            raise UserError(f"There is no table {self.path}: config.annotate.table names a Parquet file.")
        with self._readable():
            self.source = pyarrow.parquet.ParquetDataset(self.path)
            # A column that other files of a folder lack would be read as nulls.
            schemas = [(file, pyarrow.parquet.read_schema(file)) for file in self.source.files]
        self.needed = ["id", *(f"{side}_{what}" for side in SIDES for what in ("teacher_ids", *columns))]
        compared = ["teacher_prompt", *(f"{one}_prompt" for one in columns)]
        compared += [f"{side}_teacher_span_ids" for side in SIDES]
        self.needed += [name for name in compared if any(name in schema.names for _, schema in schemas)]
        if not schemas:
            raise UserError(f"{self.path} is a folder without a Parquet file.")
        for file, schema in schemas:
            for name in self.needed:
                if (count := schema.names.count(name)) != 1:
                    there = f"it has {printable(', '.join(schema.names))}"
                    raise UserError(f"{file} has {count or 'no'} column{'s' * (count > 1)} {name}; {there}.")
                told, wanted = schema.field(name).type, "lists of numbers" if name != "id" else "strings or integers"
                if not (_lists_numbers(told) if name != "id" else _names(told)):
                    raise UserError(f"{file}: {name} holds {printable(str(told))}, not {wanted}.")
                first = schemas[0][1].field(name).type
                if name != "id" and told.value_type != first.value_type:  # they would be read as the first file's
                    raise UserError(f"{file}: {name} holds {told}, in {schemas[0][0]} {first}; write both as one type.")

        # 2. Where each pair's row is.
        with self._readable():
            ids = self.source.read(columns=["id"]).column("id").to_pylist()
        self.places: dict[str, int] = {}
        for place, one in enumerate(ids):
            if self.places.setdefault(str(one), place) != place:
                raise UserError(f"{self.path} has two rows of pair {printable(str(one))}.")

    @cached_property
    def rows(self) -> Any:
        with self._readable():
            return self.source.read(columns=self.needed)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, UnicodeError) as error:
            said = printable((str(error).splitlines() or [type(error).__name__])[0])
            raise UserError(f"{self.path} cannot be read as Parquet: {said}") from None

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
            if len(values) != len(tokens.ids):
                self._same(pair, place, f"{name}_teacher_span_ids", tokens.span_ids)
            found.append(summed(what, values, tokens.span_ids))
        return found[0], found[1]

    def _list(self, place: int, name: str) -> np.ndarray:
        found = self.rows.column(name)[place]
        return found.values.to_numpy(zero_copy_only=False) if found.is_valid else np.zeros(0)

    def _same(self, pair: AlignedPair, place: int, name: str, ids: np.ndarray) -> None:
        if name not in self.rows.column_names:  # of a prompt, or of spans
            return
        told = self._list(place, name)
        if not np.array_equal(told, ids):
            differ = next((i for i, (a, b) in enumerate(zip(told, ids)) if a != b), min(len(told), len(ids)))
            raise UserError(
                f"{self.path}: {name} of pair {pair.id} are not the teacher's tokens here, from place {differ} of "
                f"{len(ids)} on: another tokenizer, chat template or limit. `ctpd table` writes those that are needed."
            )


def _lists_numbers(told: Any) -> bool:
    """Whether an Arrow type is of lists of numbers; a dictionary has values too, and is none."""
    from pyarrow import types

    lists = types.is_list(told) or types.is_large_list(told) or types.is_fixed_size_list(told)
    return lists and (types.is_integer(told.value_type) or types.is_floating(told.value_type))


def _names(told: Any) -> bool:
    """Whether an Arrow type is of what can name a pair."""
    from pyarrow import types

    of = told.value_type if types.is_dictionary(told) else told
    return types.is_string(of) or types.is_large_string(of) or types.is_integer(of)
