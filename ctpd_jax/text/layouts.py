"""One row of a preference data set, in any of the usual column layouts -> prompt, chosen, rejected.

A layout says by which columns it is known and how its answers are ranked (answers.py); the prompt is read the same way
for all of them: from a column of its own (PROMPT_COLUMNS), from the conversations before the answers (UltraFeedback
Binarized), or, for bare texts, before the last separator (HH-RLHF: "\\n\\nAssistant:").

A prompt is never guessed from the characters that two texts share: "Paris" and "Pari is" share a prefix that is no
prompt. Conversations are divided between messages, texts at a declared separator.

Readers take out of the row what they understand; what is left is harmless, or the row is left out (columns.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ctpd_jax.schema import Counters, Message
from ctpd_jax.text import dialogue
from ctpd_jax.text.answers import EXPECTED, Answer, Row, chosen_pairs, read_answers, refuse_token_ids
from ctpd_jax.text.columns import (
    AS_IT_STANDS,
    LISTS,
    LeftOut,
    Reading,
    empty,
    from_json,
    plain,
    renamed,
    require_understood,
)
from ctpd_jax.text.dialogue import HH_SEPARATOR, messages

# The first of these that a row holds is its prompt. "conversations" is ShareGPT's name for the turns so far; OpenAI's
# "input" holds "messages".
PROMPT_COLUMNS = (
    *("prompt", "context", "conversations", "conversation", "question", "instruction", "query", "messages"),
    *("input", "history"),
)
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")


@dataclass(frozen=True)
class RawPair:
    """A row after its layout has been understood."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


def read_row(
    row: Mapping[str, Any], separator: str, counters: Counters, reading: Reading = AS_IT_STANDS
) -> list[RawPair | LeftOut]:
    """Understands one row: one pair, or, of ranked answers, several.

    Args:
      row: its columns; values as JSON, TFDS (bytes, NumPy) or a Hugging Face data set has them.
      separator: what stands between prompt and answer where both are one text, as in HH-RLHF.
      counters: receives what was seen and not used ("completions not used", "prompt column differs").
      reading: names, and what is to be done with templates and ranks.

    Returns:
      The pairs, and in place of one that cannot be used the reason. A row is never an error.
    """
    try:
        left = {name: plain(value) for name, value in row.items() if name not in reading.ignore}
        left = renamed(left, reading.columns)
        if reading.strip_template:
            left = dialogue.without_template(left)
        refuse_token_ids(left, PROMPT_COLUMNS)
        answers = read_answers(left, reading)
        prompt = _prompt(left, answers, reading)
        system = _system(left)
        found: list[RawPair | LeftOut] = []
        for better, worse in chosen_pairs(answers, reading.ranked, counters):
            try:
                pair = _with_system(_pair(prompt, better.value, worse.value, separator, counters, reading), system)
                said = [pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]
                said += [better.value, worse.value, *([prompt.raw] if prompt else ())]
                require_understood(left, reading, said=said)
                found.append(_checked(pair))
            except LeftOut as reason:
                found.append(reason)
        return found
    except LeftOut as reason:
        return [reason]


# ------------------------------------------------------------------------------------------------ prompt


@dataclass(frozen=True)
class Prompt:
    """A row's own prompt, before its answers are known."""

    messages: tuple[Message, ...]
    raw: Any = None  # the column as it stands
    text: str | None = None  # of a column "prompt" that holds a text, and is all there is
    dialogue: bool = False  # the answers go on in HH-RLHF's notation


def _prompt(row: Row, answers: list[Answer], reading: Reading) -> Prompt | None:
    """The prompt that stands in a column of its own, with the history before it; None where there is none."""
    for name in PROMPT_COLUMNS:
        if any(_is_end(row.get(name), answer.value) for answer in answers):
            del row[name]  # UltraFeedback's "messages" are "chosen" once more
    if "history" in row:
        row["history"] = None if empty(row["history"]) else from_json(row["history"], LISTS)
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
    before: tuple[Message, ...] = ()
    if name != "history" and not isinstance(row.get("history"), str | None):
        before = dialogue.history(row.pop("history"), reading)
    if not isinstance(value, str):
        said = dialogue.history(value, reading) if name == "history" else messages(value, name, reading)
        return Prompt(before + said, raw)
    if name == "instruction" and isinstance(row.get("input"), str) and row["input"]:
        value = f"{value}\n{row.pop('input')}"
    text = value if name == "prompt" and not before else None
    return Prompt(before + dialogue.turns(value), raw, text, dialogue.is_dialogue(value))


def _is_end(turns: Any, conversation: Any) -> bool:
    both = isinstance(turns, list) and isinstance(conversation, list) and bool(turns)
    return both and conversation[-len(turns) :] == turns


def _system(row: Row) -> str:
    """What a column of its own says as the system; one that says it a second time is left to be judged."""
    for name in SYSTEM_COLUMNS:
        if isinstance(row.get(name), str) and row[name]:
            return row.pop(name)
    return ""


def _with_system(pair: RawPair, system: str) -> RawPair:
    said = [message.content for message in pair.prompt if message.role == "system"]
    if not system or said == [system]:
        return pair
    if said:
        raise LeftOut("the system column and the conversation's system message differ")
    return replace(pair, prompt=(Message("system", system), *pair.prompt))


# ------------------------------------------------------------------------------------------------ pairs


def _pair(
    prompt: Prompt | None, chosen: Any, rejected: Any, separator: str, counters: Counters, reading: Reading
) -> RawPair:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise LeftOut("one answer is a text and one is not", "they must both be texts or both be messages")
    if isinstance(chosen, str):
        if prompt is None:
            return _split_texts(chosen, rejected, separator, counters)
        if prompt.dialogue:
            chosen, rejected = (dialogue.dialogue_answer(text, counters) for text in (chosen, rejected))
        return RawPair(prompt.messages, chosen, rejected)

    before, chosen = _answer(messages(chosen, "chosen", reading), "chosen")
    before_rejected, rejected = _answer(messages(rejected, "rejected", reading), "rejected")
    if before != before_rejected:
        raise LeftOut("the answers follow different prompts")
    if prompt is None:
        if not before:
            raise LeftOut("one message each and no prompt", f"expected {EXPECTED}")
        return RawPair(before, chosen, rejected)
    if prompt.text is not None and before:
        # UltraFeedback repeats the first user message as a text; the conversation is the fuller account of the two.
        if prompt.text and prompt.text not in [message.content for message in before]:
            counters.add("prompt column differs from the conversation")
        return RawPair(before, chosen, rejected)
    return RawPair(_joined(prompt.messages, before), chosen, rejected)


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
    """The prompt column and the turns before the answer, which repeat it, continue it, or are its end."""
    if before[: len(prompt)] == prompt:
        return before
    if prompt[len(prompt) - len(before) :] == before:
        return prompt
    if before[0].role == "assistant" and prompt[-1].role == "user":
        return prompt + before
    raise LeftOut("the prompt and the turns before the answer neither repeat nor continue each other")


def _split_texts(chosen: str, rejected: str, separator: str, counters: Counters) -> RawPair:
    if not chosen or not rejected:
        raise LeftOut("empty answer")
    in_notation = separator == HH_SEPARATOR and dialogue.is_dialogue(chosen)
    cut_chosen, cut_rejected = chosen.rfind(separator), rejected.rfind(separator)
    if cut_chosen < 0 or cut_rejected < 0:
        if in_notation:
            raise LeftOut('"Human:" and "Assistant:" without blank lines before them')
        raise LeftOut(
            "texts without a prompt",
            f"there is no {separator!r} inside the texts, so the prompt is unknown; "
            f'expected {EXPECTED}. An empty "prompt" declares that there is none',
        )
    if chosen[:cut_chosen] != rejected[:cut_rejected]:
        raise LeftOut("the answers follow different prompts")
    head, answers = chosen[:cut_chosen], [text[cut_chosen + len(separator) :] for text in (chosen, rejected)]
    if not in_notation:
        answers = [text.removeprefix(" ") for text in answers]  # it belongs to the layout, not to the answer
        return RawPair((Message("user", head),) if head else (), answers[0], answers[1])
    if not head.strip():
        raise LeftOut("a dialogue that the assistant begins")
    answers = [dialogue.dialogue_answer(text, counters) for text in answers]
    return RawPair(dialogue.turns(head), answers[0], answers[1])


def _checked(pair: RawPair) -> RawPair:
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise LeftOut("empty answer")
    if pair.chosen == pair.rejected:
        raise LeftOut("identical answers")
    try:
        "".join([pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, or bytes that are no UTF-8: no tokenizer can read it
        raise LeftOut("text with a lone surrogate") from None
    return pair
