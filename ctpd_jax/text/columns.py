"""What becomes of a row's fields: each one is read, known to be harmless, or a reason to leave the row out.

Readers take what they understand out of a row (`dict.pop`), and `require_understood` judges what is left: of a row, of
a message, of a part of its content, of a ranked answer.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctpd_jax.errors import UserError, printable


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names that end in one of these words say where a row comes from and what it is worth, not what is read or answered.
# "chosen", "rejected", "a", "b" and numbers at the end do not count: score_chosen and model_a end in score and model.
HARMLESS_ENDINGS = _words(
    "id uuid idx index hash sha256 score scores rating ratings reward rewards rank margin model models source dataset "
    "origin split subset category domain language lang topic license url date time timestamp utc author annotator "
    "judge version length metadata meta"
)
# Of UltraFeedback, HelpSteer and OpenAI: accounts of a judgement, and how an answer was drawn.
HARMLESS_NAMES = _words(
    "annotations critique principle custom_system_prompt correct_answers incorrect_answers individual_preference "
    "preference_statement preference_elaboration three_most_similar_preferences all_preferences_unprocessed "
    "parallel_tool_calls"
)
# What is no text is harmless too, but not under these names.
NEVER_HARMLESS = _words(
    "prompt context conversations conversation question instruction query messages input history system "
    "system_prompt system_message tools functions tool_calls tool_call_id function_call chat_template_kwargs "
    "enable_thinking image images pixel_values audio audios video videos document documents label labels winner choice "
    "preference preferred winner_tie winner_model_a winner_model_b better_response_id overall_preference "
    "preference_strength"
)
# Whether something is learned from: 1 is what happens anyway.
LEARNED = _words("weight weights loss_weight loss train trainable")
_SIDES = _words("chosen rejected a b x y")


class LeftOut(Exception):
    """A row that cannot be used: the reason that it is counted by, a detail, and fields that were not understood."""

    def __init__(self, reason: str, detail: str = "", fields: Collection[str] = ()) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.fields = f"left out: {printable(reason)}", detail, tuple(fields)


@dataclass(frozen=True)
class Reading:
    """How rows are read: the part of config.data that decides which pairs they give."""

    columns: Mapping[str, str]  # the name that is understood -> the name in the file
    ignore: frozenset[str] = frozenset()  # fields declared harmless
    ranked: str = "best_worst"  # of several ranked answers; or "all": every pair of different rank
    strip_template: bool = False  # take a chat template's markers off the texts
    min_kept: float = 0.0  # share of the rows

    @classmethod
    def of(cls, data: Any) -> Reading:
        """Take what config.data says. Raises UserError for `columns` that are no list of name=name."""
        ignore = frozenset(name.strip() for name in data.ignore.split(",") if name.strip())
        return cls(column_map(data.columns), ignore, data.ranked, data.strip_template, data.min_kept)


AS_IT_STANDS = Reading({})


def column_map(text: str) -> dict[str, str]:
    """Read "prompt=question,chosen=good" as {"prompt": "question", "chosen": "good"}."""
    found = {}
    for part in text.split(",") if text.strip() else ():
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (name and equals and column) or name in found:
            raise UserError(
                f"config.data.columns is {text!r}; write name=column, as in prompt=question,chosen=good,rejected=bad."
            )
        found[name] = column
    return found


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row under the names that are understood; what stood under such a name before is ignored.

    A row without the named column keeps its own: it is judged as it stands, and nothing of it is lost.
    """
    there = {name: column for name, column in columns.items() if column in row}
    kept = {name: value for name, value in row.items() if name not in there and name not in there.values()}
    return kept | {name: row[column] for name, column in there.items()}


def plain(value: Any) -> Any:
    """Return a value of TFDS (bytes, NumPy) in Python's own str, int, float, list and dict."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        # Bytes that are no UTF-8 become lone surrogates, which no prompt and no answer may hold.
        return value.decode("utf-8", errors="surrogateescape")
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def empty(value: Any) -> bool:
    """Tell whether a field says nothing: null, NaN, white space, a container of such, also written as JSON text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(map(empty, value.values()))
    if isinstance(value, list):  # a call of a tool is there, whatever it holds
        return not any(isinstance(item, dict) for item in value) and all(map(empty, value))
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(value: Any) -> float | None:
    """Return a number, also as a .csv writes it; None for anything else."""
    try:
        found = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):  # a text, or a number of hundreds of digits
        return None
    return None if math.isnan(found) else found


def _without_text(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_without_text, value.values()))
    if isinstance(value, list):
        return all(map(_without_text, value))
    return not isinstance(value, str) or empty(value)


def harmless(name: str, value: Any) -> bool:
    """Tell whether a field that nobody reads can change neither prompt nor answers; docs/data.md lists these."""
    # 1. What says nothing, and the names of which it is known what they mean.
    name = name.lower()
    if empty(value):
        return True
    if name in LEARNED:
        return number(value) == 1
    if name in NEVER_HARMLESS:
        return False
    # 2. The last word of the name, or else that there is no text in it.
    words = [word for word in re.split(r"[^a-z0-9]+", name) if word]
    while len(words) > 1 and (words[-1] in _SIDES or words[-1].isdigit()):
        words.pop()
    return name in HARMLESS_NAMES or (bool(words) and words[-1] in HARMLESS_ENDINGS) or _without_text(value)


def require_understood(
    left: Mapping[str, Any], reading: Reading, what: str = "column", said: Collection[Any] = ()
) -> None:
    """Raise LeftOut where a field that no reader took may change the prompt or an answer.

    Those that only repeat what is `said` are fine.
    """
    unknown = [
        name
        for name, value in left.items()
        if name not in reading.ignore and not harmless(name, value) and value not in said
    ]
    if unknown:
        raise LeftOut(f'{what} "{unknown[0]}" is not understood', fields=unknown)


MESSAGES = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|content|from|value)["']\s*:""")
LISTS = re.compile(r"""\s*\[\s*[\[{"']""")


def from_json(value: Any, form: re.Pattern[str] = MESSAGES) -> Any:
    """Read what was stored as a text, in JSON or Python's own notation; what does not look like it stays as it is."""
    if not isinstance(value, str) or not form.match(value):
        return value
    for read in (json.loads, ast.literal_eval):  # pandas writes the latter into a .csv
        try:
            return plain(read(value))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    raise LeftOut("messages stored as a text that cannot be read", value[:60])


def quoted(names: Collection[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "(none)"
