"""One row of a preference data set, in any of the usual column layouts -> PreferencePair.

The layouts of answers are in answers.py. The prompt is read alike for all of them: from a column of its own
(PROMPT_COLUMNS), from the conversations before the answers (UltraFeedback Binarized), or, for bare texts, before the
last separator (HH-RLHF: "\\n\\nAssistant:"). It is never guessed from the characters that two texts share: "Paris" and
"Pari is" share a prefix that is no prompt.

Readers take out of the row what they understand; what is left is harmless, or the row is left out (columns.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ctpd_jax.schema import Counters, Message, PreferencePair
from ctpd_jax.text import columns, dialogue
from ctpd_jax.text.answers import EXPECTED, LAYOUTS, Answer, Row, compared, read_answers
from ctpd_jax.text.columns import LeftOut, Reading, empty, from_json, number, require_understood
from ctpd_jax.text.dialogue import messages

# The first of these that a row holds is its prompt. "conversations" is ShareGPT's name for the turns so far; OpenAI's
# "input" holds "messages".
PROMPT_COLUMNS = (
    *("prompt", "context", "conversations", "conversation", "question", "instruction", "query", "messages"),
    *("input", "history"),
)
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
# What the report notes of columns by name, and a count.
SEEN, HARMLESS, UNKNOWN = "columns", "harmless columns", "columns not understood"
TEMPLATED = "rows that carry a chat template"


def read_row(
    row: Mapping[str, Any], separator: str, report: Counters, reading: Reading = columns.AS_IT_STANDS
) -> list[PreferencePair | LeftOut]:
    """Read one row: one pair, or several of ranked answers, and in place of one that cannot be used the reason.

    Args:
      row: its columns; values as JSON, TFDS (bytes, NumPy) or a Hugging Face data set has them.
      separator: what stands between prompt and answer where both are one text, as in HH-RLHF.
      report: receives the columns, and what was seen and not used ("completions not used").
      reading: names, and what is to be done with templates and ranks.
    """
    try:
        # 1. The columns under the names that are known here, in Python's own types.
        left = {name: columns.plain(value) for name, value in row.items() if name not in reading.ignore}
        _note_columns(left, report)
        left = columns.renamed(left, reading.columns)
        if reading.strip_template:
            left = dialogue.without_template(left)
        # 2. Each reader takes its columns out of `left`.
        _refuse_token_ids(left)
        answers = read_answers(left, reading)
        prompt = _own_prompt(left, answers, reading)
        system = next((left.pop(name) for name in SYSTEM_COLUMNS if isinstance(left.get(name), str) and left[name]), "")
        weight, margin = _worth(left)
        # 3. One pair of each two answers that are compared, if nothing is left that could change it.
        found: list[PreferencePair | LeftOut] = []
        for better, worse in compared(answers, reading.ranked, report):
            try:
                pair = _with_system(_pair(prompt, better.value, worse.value, separator, report, reading), system)
                said = [pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]
                said += [better.value, worse.value, *([prompt.raw] if prompt else ())]
                require_understood(left, reading, said=said)
                found.append(replace(usable(pair), weight=weight, margin=margin))
            except LeftOut as reason:
                found.append(reason)
        return found
    except LeftOut as reason:
        return [reason]
    except RecursionError:
        return [LeftOut("values nested too deeply")]


def _worth(row: Row) -> tuple[float, float | None]:
    """Read how much a pair counts, and by how much its chosen answer is the better one."""
    names = ("margin", "weight", "score_chosen", "score_rejected")
    margin, weight, chosen, rejected = (number(row.get(name)) for name in names)
    if margin is None and chosen is not None and rejected is not None:
        margin = chosen - rejected
    # A pair of weight 0 would teach nothing, and one below that the opposite: then it stays what nobody understood.
    if weight is None or not 0 < weight < math.inf:
        return 1.0, margin
    del row["weight"]
    return weight, margin


def _note_columns(row: Row, report: Counters) -> None:
    said = {name: value for name, value in row.items() if not empty(value)}
    read = {name: value for name, value in said.items() if not columns.harmless(name, value)}
    for name in said:
        report.note(SEEN if name in read else HARMLESS, name, most=50)
    if any(map(dialogue.carries_template, read.values())):
        report.add(TEMPLATED)


def _refuse_token_ids(row: Row) -> None:
    def ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)

    known = {*PROMPT_COLUMNS, *(name for layout, _ in LAYOUTS for name in layout)}
    tokenized = [name for name in row if (name.endswith("input_ids") or name in known) and ids(row[name])]
    if tokenized and not ("chosen" in row and "chosen" not in tokenized):
        raise LeftOut(
            "token ids instead of texts",
            f"the columns {columns.quoted(tokenized)} hold token ids; two tokenizers are to read the text, so give "
            "the text",
        )


# ------------------------------------------------------------------------------------------------ prompt


@dataclass(frozen=True)
class Prompt:
    """A row's own prompt, before its answers are known."""

    messages: tuple[Message, ...]
    raw: Any = None  # the column as it stands
    text: str | None = None  # of a column "prompt" that holds a text, and is all there is
    dialogue: bool = False  # the answers go on in HH-RLHF's notation


def _own_prompt(row: Row, answers: list[Answer], reading: Reading) -> Prompt | None:
    """Read the prompt that stands in a column of its own, with the history before it; None where there is none."""
    # 1. The column: the first one that says something, or else one that says that there is no prompt.
    for name in PROMPT_COLUMNS:
        if any(_is_end(row.get(name), answer.value) for answer in answers):
            del row[name]  # UltraFeedback's "messages" are "chosen" once more
    if "history" in row:
        row["history"] = None if empty(row["history"]) else from_json(row["history"], columns.LISTS)
    given = [name for name in PROMPT_COLUMNS if isinstance(row.get(name), str) or not empty(row.get(name))]
    if not given:
        return None
    name = next((name for name in given if not empty(row[name])), given[0])
    raw = row.pop(name)
    value = from_json(raw)
    if name == "input" and isinstance(value, dict) and "messages" in value:
        rest = dict(value)
        value = from_json(rest.pop("messages"))
        require_understood(rest, reading, 'field of "input"')
    # 2. The turns before it.
    before: tuple[Message, ...] = ()
    if name != "history" and not isinstance(row.get("history"), str | None):
        before = dialogue.history(row.pop("history"), reading)
    # 3. Its messages: a list of them, or a text, perhaps a dialogue in HH-RLHF's notation.
    if not isinstance(value, str):
        said = dialogue.history(value, reading) if name == "history" else messages(value, name, reading)
        return Prompt(before + said, raw)
    if name == "instruction" and isinstance(row.get("input"), str) and row["input"]:
        value = f"{value}\n{row.pop('input')}"
    text = value if name == "prompt" and not before else None
    return Prompt(before + dialogue.turns(value), raw, text, dialogue.is_dialogue(value))


def _is_end(turns: Any, conversation: Any) -> bool:
    both = isinstance(turns, list) and isinstance(conversation, list)
    return both and bool(turns) and conversation[-len(turns) :] == turns


def _with_system(pair: PreferencePair, system: str) -> PreferencePair:
    said = [message.content for message in pair.prompt if message.role == "system"]
    if not system or said == [system]:
        return pair
    if said:
        raise LeftOut("the system column and the conversation's system message differ")
    return replace(pair, prompt=(Message("system", system), *pair.prompt))


def _pair(
    prompt: Prompt | None, chosen: Any, rejected: Any, separator: str, report: Counters, reading: Reading
) -> PreferencePair:
    """Put the prompt and two answers together, whether they are texts or conversations. The id comes later."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise LeftOut("one answer is a text and one is not", "they must both be texts or both be messages")
    if isinstance(chosen, str):
        if prompt is None:
            return _split_texts(chosen, rejected, separator, report)
        if prompt.dialogue:
            chosen, rejected = (dialogue.dialogue_answer(text, report) for text in (chosen, rejected))
        return PreferencePair("", prompt.messages, chosen, rejected)

    before, chosen = _answer(messages(chosen, "chosen", reading), "chosen")
    before_rejected, rejected = _answer(messages(rejected, "rejected", reading), "rejected")
    if before != before_rejected:
        raise LeftOut("the answers follow different prompts")
    if prompt is None:
        if not before:
            raise LeftOut("one message each and no prompt", f"expected {EXPECTED}")
    elif prompt.text is not None and before:
        # UltraFeedback repeats the first user message as a text; the conversation is the fuller account of the two.
        if prompt.text and prompt.text not in [message.content for message in before]:
            report.add("prompt column differs from the conversation")
    else:
        before = _joined(prompt.messages, before)
    return PreferencePair("", before, chosen, rejected)


def _answer(said: tuple[Message, ...], column: str) -> tuple[tuple[Message, ...], str]:
    if not said:
        raise LeftOut("empty answer")
    if said[-1].role != "assistant":
        raise LeftOut(
            "the last message is not the assistant's",
            f'the last message of "{column}" is by "{said[-1].role}"; the answer is the assistant\'s',
        )
    return said[:-1], said[-1].content


def _joined(prompt: tuple[Message, ...], before: tuple[Message, ...]) -> tuple[Message, ...]:
    """Join the prompt column and the turns before the answer, which repeat it, continue it, or are its end."""
    if before[: len(prompt)] == prompt:
        return before
    if prompt[len(prompt) - len(before) :] == before:
        return prompt
    if before[0].role == "assistant" and prompt[-1].role == "user":
        return prompt + before
    raise LeftOut("the prompt and the turns before the answer neither repeat nor continue each other")


def _split_texts(chosen: str, rejected: str, separator: str, report: Counters) -> PreferencePair:
    """Cut two texts at the last separator, before which they must be the same."""
    if not chosen or not rejected:
        raise LeftOut("empty answer")
    in_notation = separator == dialogue.HH_SEPARATOR and dialogue.is_dialogue(chosen)
    head, found, chosen = chosen.rpartition(separator)
    head_rejected, found_rejected, rejected = rejected.rpartition(separator)
    # 1. Why there is no prompt.
    if not found or not found_rejected:
        if in_notation:
            raise LeftOut('"Human:" and "Assistant:" without blank lines before them')
        raise LeftOut(
            "texts without a prompt",
            f"there is no {separator!r} inside the texts, so the prompt is unknown; "
            f'expected {EXPECTED}. An empty "prompt" declares that there is none',
        )
    if head != head_rejected:
        raise LeftOut("the answers follow different prompts")
    # 2. A space after the separator belongs to the layout, not to the answer.
    if not in_notation:
        prompt = (Message("user", head),) if head else ()
        return PreferencePair("", prompt, chosen.removeprefix(" "), rejected.removeprefix(" "))
    # 3. In HH-RLHF's notation the prompt is a dialogue, and an answer may be followed by more of it.
    if not head.strip():
        raise LeftOut("a dialogue that the assistant begins")
    chosen, rejected = (dialogue.dialogue_answer(text, report) for text in (chosen, rejected))
    return PreferencePair("", dialogue.turns(head), chosen, rejected)


def usable(pair: PreferencePair) -> PreferencePair:
    """Return the pair with its id. Raises LeftOut where nothing can be learned from it."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise LeftOut("empty answer")
    if pair.chosen == pair.rejected:
        raise LeftOut("identical answers")
    try:
        "".join([pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, or bytes that are no UTF-8: no tokenizer can read it
        raise LeftOut("text with a lone surrogate") from None
    # The id is a hash of the texts and roles: it names the same pair whatever the order of the file.
    texts = [[[message.role, message.content] for message in pair.prompt], pair.chosen, pair.rejected]
    return replace(pair, id=hashlib.sha256(json.dumps(texts, ensure_ascii=True).encode("ascii")).hexdigest()[:16])
