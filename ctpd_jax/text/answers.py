"""The answers of a row and which of them is better, by the columns that people write them in.

LAYOUTS says by which columns a layout is known and who reads it. A reader takes what it reads out of the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

from ctpd_jax.schema import Counters
from ctpd_jax.text.columns import LISTS, LeftOut, Reading, empty, from_json, number, quoted, require_understood
from ctpd_jax.text.dialogue import records

EXPECTED = (
    '"chosen" and "rejected" (each a text or a list of {"role", "content"} messages) with a "prompt", '
    'or "context" and "completions" with ranks, or another layout of docs/data.md'
)
UNKNOWN_LAYOUT = "columns in no known layout"

Row = dict[str, Any]  # what has not been read yet of a row's columns


class Answer(NamedTuple):
    value: Any  # a text, one message, or a conversation that ends with the answer
    score: float  # more is better


def _in_order(row: Row, reading: Reading, better: str, worse: str) -> list[Answer]:
    return [Answer(from_json(row.pop(better)), 1), Answer(from_json(row.pop(worse)), 0)]


def _after_messages(row: Row, reading: Reading, conversation: str, rejected: str) -> list[Answer]:
    """Read a whole conversation, and another answer for its end."""
    said, other = from_json(row.pop(conversation)), from_json(row.pop(rejected))
    said = records(said, conversation)
    other = records([{"role": "assistant", "content": other}] if isinstance(other, str) else other, rejected)
    return [Answer(said, 1), Answer(other if len(other) > 1 else [*said[:-1], *other], 0)]


def _best_first(row: Row, reading: Reading, column: str) -> list[Answer]:
    answers = row.pop(column)
    if not isinstance(answers, list) or len(answers) != 2:
        raise LeftOut(f'"{column}" does not hold a better and a worse answer', f"it holds {len(answers)}")
    return [Answer(from_json(value), -place) for place, value in enumerate(answers)]


_TEXTS = ("completion", "response", "answer", "text", "content", "output")
_SCORES = ("rank", "overall_score", "score", "rating", "reward")


def _ranked(row: Row, reading: Reading, column: str) -> list[Answer]:
    """Read a list of records, each an answer and its rank (0 is the best) or its score (more is better)."""
    answers = []
    for record in map(dict, records(row.pop(column), column)):
        # The first name of each list that the record holds; a rank counts from the best.
        text = next((name for name in _TEXTS if record.get(name) is not None), None)
        name = next((name for name in _SCORES if record.get(name) is not None), "rank")
        score = number(record.pop(name, None))
        if text is None or score is None:
            raise LeftOut(
                "ranked answers without a rank",
                f'each of "{column}" needs a number "rank" (0 is the best) or "score", and a "completion"',
            )
        answers.append(Answer(from_json(record.pop(text)), -score if name == "rank" else score))
        require_understood(record, reading, f'field of "{column}"')
    if len(answers) < 2:
        raise LeftOut("fewer than two ranked answers", f'"{column}" holds {len(answers)}; it needs at least two')
    return answers


def _labelled(row: Row, reading: Reading, first: str, second: str) -> list[Answer]:
    """Read two answers side by side and a verdict."""
    if "winner_model_a" in row:  # LMSYS writes every text as a list of the turns
        row |= {name: _only_turn(row[name]) for name in ("prompt", first, second) if name in row}
    verdict = _verdict(row, first, second)
    if verdict == 0:
        raise LeftOut("a tie")
    return [Answer(from_json(row.pop(first)), verdict), Answer(from_json(row.pop(second)), -verdict)]


def _only_turn(value: Any) -> Any:
    turns = from_json(value, re.compile(r"""\s*\[\s*([\[{"'\]]|null|None)"""))  # a list of texts, or of nothing
    if not isinstance(turns, list):
        return value
    if empty(turns):
        raise LeftOut("empty answer")
    if len(turns) != 1 or not isinstance(turns[0], str):
        raise LeftOut("answers of several turns side by side")
    return turns[0]


# Verdicts in numbers: of which first answer, its sign where the first one is better, and what is a tie.
_NUMBERS = {
    "overall_preference": (("response1", "response_1"), -1, 0),  # HelpSteer
    "preference_strength": (("response1", "response_1"), -1, 0),
    "labels": (("human_ref_A",), 1, 0.5),  # SHP: 1 prefers A
    "better_response_id": (("response_0",), -1, 0.5),  # PKU-SafeRLHF: the better one's number
}
_FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")


def _verdict(row: Row, first: str, second: str) -> int:
    """Return 1 where the first answer is the better one, -1 where the second is, 0 for a tie.

    A bare 0 or 1 is read only where its data set says what it means: elsewhere one half of the world counts answers
    from 0, the other writes 1 for the first.
    """
    # 1. LMSYS: one flag for each outcome.
    flags = tuple(number(row.get(name)) for name in _FLAGS)
    if (flags[:2] in ((1, 0), (0, 1)) and flags[2] in (0, None)) or flags == (0, 0, 1):
        for name in _FLAGS:
            row.pop(name, None)
        return int(flags[0] == 1) - int(flags[1] == 1)
    # 2. A number under a name that says what it means.
    for name, (firsts, sign, middle) in _NUMBERS.items():
        value = number(row.get(name))
        if value is not None and first in firsts:
            row.pop(name)
            ahead = sign * (value - middle)
            return (ahead > 0) - (ahead < 0)
    # 3. A word that names one of the two.
    ends = [name.lower() for name in (first, second)]
    for name in ("winner", "label", "preference", "preferred", "choice"):
        word = row.get(name)
        if isinstance(word, str) and not empty(word) and number(word) is None:  # a .csv writes numbers as text
            word = word.strip().lower()
            named = [word in (end, end.rpartition("_")[2], f"model_{end[-1]}") for end in ends]
            if any(named) or word.startswith("tie"):
                row.pop(name)
                return int(named[0]) - int(named[1])
    raise LeftOut("two answers and no verdict that names one", f'such as "winner": "{first}"')


# The columns that a row is known by, and who reads its answers. The first that fits is taken.
LAYOUTS: tuple[tuple[tuple[str, ...], Callable[..., list[Answer]]], ...] = (
    (("chosen", "rejected"), _in_order),
    (("chosen_response", "rejected_response"), _in_order),
    (("accepted", "rejected"), _in_order),
    (("preferred_output", "non_preferred_output"), _in_order),  # OpenAI
    *(
        ((turns, rejected), _after_messages)
        for turns in ("messages", "conversations", "conversation")
        for rejected in ("rejected_response", "rejected_messages", "rejected")
    ),
    *(((name,), _ranked) for name in ("completions", "answers", "responses")),
    (("response_a", "response_b"), _labelled),
    (("answer_a", "answer_b"), _labelled),
    (("completion_a", "completion_b"), _labelled),
    (("conversation_a", "conversation_b"), _labelled),
    (("response_1", "response_2"), _labelled),
    (("response1", "response2"), _labelled),
    (("response_0", "response_1"), _labelled),
    (("human_ref_A", "human_ref_B"), _labelled),
    (("output",), _best_first),
)


def read_answers(row: Row, reading: Reading) -> list[Answer]:
    for columns, read in LAYOUTS:
        if any(row.get(name) is None for name in columns):
            continue
        if len(columns) == 1:  # a list of answers; "output" is also the name of a single text
            row[columns[0]] = from_json(row[columns[0]], LISTS)
            if not isinstance(row[columns[0]], list | dict):
                continue
        return read(row, reading, *columns)
    # The columns are there, and one of them holds nothing.
    if any(set(columns) <= row.keys() and read is _in_order for columns, read in LAYOUTS):
        raise LeftOut("empty answer")
    raise LeftOut(UNKNOWN_LAYOUT, f"found the columns {quoted(row)}; expected {EXPECTED}")


def compared(answers: list[Answer], ranked: str, report: Counters) -> list[tuple[Answer, Answer]]:
    """Return the better and the worse answer of each pair: the best against the worst, or all of different rank."""
    # A tie between the best and the worst is a tie of all.
    best, worst = max(answers, key=lambda one: one.score), min(answers, key=lambda one: one.score)
    if best.score == worst.score:
        raise LeftOut("completions of one rank")
    if ranked == "all":
        ordered = sorted(answers, key=lambda one: -one.score)
        return [(one, other) for one, other in combinations(ordered, 2) if one.score > other.score]
    if len(answers) > 2:
        report.add("completions not used", len(answers) - 2)
    return [(best, worst)]
