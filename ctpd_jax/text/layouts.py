"""One row of a preference data set, in any of the usual column layouts -> prompt, chosen, rejected.

The layouts, tried in this order:

1. `completions` ranked, with `context` (NeMo): rank 0 is the best; the best and the worst completion make the pair.
2. `chosen` and `rejected`, each a text, one message, or a conversation whose last message is the answer; the prompt
   in a column of its own (PROMPT_COLUMNS), in the conversations before the answer (UltraFeedback Binarized), or, for
   bare texts, before the last separator (HH-RLHF: "\\n\\nAssistant:").

A prompt is never guessed from the characters that two texts share: "Paris" and "Pari is" share a prefix that is no
prompt. Conversations are divided between messages, texts at a declared separator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Counters, Message

HH_SEPARATOR = "\n\nAssistant:"
HH_USER = "\n\nHuman:"

# The first of these that a row holds is its prompt. "conversations" is ShareGPT's name for the turns so far.
PROMPT_COLUMNS = ("prompt", "context", "conversations", "question", "instruction")
ANSWER_COLUMNS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
EXPECTED = (
    '"chosen" and "rejected" (each a text or a list of {"role", "content"} messages) with a "prompt", '
    'or "context" and "completions" with ranks'
)
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


class LeftOut(Exception):
    """A row that is well-formed but holds no usable preference; `args[0]` is the name of its counter."""


@dataclass(frozen=True)
class RawPair:
    """A row after its layout has been understood."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


def read_row(row: Mapping[str, Any], separator: str, counters: Counters) -> RawPair:
    """Understands one row.

    Args:
      row: its columns; values as JSON, TFDS (bytes, NumPy) or a Hugging Face data set has them.
      separator: what stands between prompt and answer where both are one text, as in HH-RLHF.
      counters: receives what was seen and not used ("completions not used", "prompt column differs").

    Raises:
      UserError: the row has another layout than those above; the message names its columns.
      LeftOut: the pair is empty, identical, or its two answers do not follow the same prompt.
    """
    row = {name: plain(value) for name, value in row.items()}
    _refuse_token_ids(row)
    if _given(row, "completions"):
        pair = _ranked(row, counters)
    else:
        for chosen, rejected in ANSWER_COLUMNS:
            if chosen in row and rejected in row:
                pair = _chosen_rejected(row, row[chosen], row[rejected], separator, counters)
                break
        else:
            raise UserError(f"found the columns {_names(row)}; expected {EXPECTED}.")
    return _checked(pair)


def plain(value: Any) -> Any:
    """TFDS hands out bytes and NumPy arrays: the same value in Python's own str, int, float, list and dict."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"a text is not valid UTF-8: {error}.") from None
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------ layouts


def _ranked(row: Mapping[str, Any], counters: Counters) -> RawPair:
    completions = _rows(row["completions"], "completions")
    ranks: list[float] = []
    for completion in completions:
        rank = completion.get("rank")
        if not isinstance(rank, int | float) or rank != rank or "completion" not in completion:
            raise UserError('each of "completions" needs a number "rank" (0 is the best) and a "completion".')
        ranks.append(rank)
    if len(completions) < 2:
        raise UserError(f'"completions" holds {len(completions)}; a preference needs at least two.')
    best, worst = min(ranks), max(ranks)
    if best == worst:
        raise LeftOut("left out: completions of one rank")
    if len(ranks) > 2:
        counters.add("completions not used", len(ranks) - 2)
    chosen = completions[ranks.index(best)]["completion"]
    rejected = completions[ranks.index(worst)]["completion"]
    return _from_answers(_prompt(row), chosen, rejected)


def _chosen_rejected(row: Mapping[str, Any], chosen: Any, rejected: Any, separator: str, counters: Counters) -> RawPair:
    if chosen is None or rejected is None:
        raise LeftOut("left out: empty answer")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError('"chosen" and "rejected" must both be texts or both be messages.')
    has_prompt = any(_given(row, name) for name in PROMPT_COLUMNS)
    if isinstance(chosen, str):
        return RawPair(_prompt(row), chosen, rejected) if has_prompt else _split_texts(row, chosen, rejected, separator)

    said_chosen, said_rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if len(said_chosen) <= 1 and len(said_rejected) <= 1:
        if not has_prompt:
            raise UserError(f"the answers hold one message each and there is no prompt; expected {EXPECTED}.")
        return _from_answers(_prompt(row), chosen, rejected)
    pair = _from_answers((), chosen, rejected)
    if not has_prompt:
        return pair
    if isinstance(row.get("prompt"), str):
        # UltraFeedback repeats the first user message as a text; the conversation is the fuller account of the two.
        if row["prompt"] not in [message.content for message in pair.prompt]:
            counters.add("prompt column differs from the conversation")
        return pair
    return RawPair(_joined(_prompt(row), pair.prompt), pair.chosen, pair.rejected)


def _joined(prompt: tuple[Message, ...], before: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt column and the turns before the answer, which repeat it, continue it, or are its end."""
    if before[: len(prompt)] == prompt:
        return before
    if prompt[len(prompt) - len(before) :] == before:
        return prompt
    if before[0].role == "assistant" and prompt[-1].role == "user":
        return prompt + before
    raise UserError("the prompt and the turns before the answer neither repeat nor continue each other.")


def _from_answers(prompt: tuple[Message, ...], chosen: Any, rejected: Any) -> RawPair:
    """Answers as a text, a message, or a conversation that ends with the answer; both must share what precedes it."""
    before_chosen, answer_chosen = _answer(chosen, "chosen")
    before_rejected, answer_rejected = _answer(rejected, "rejected")
    if before_chosen != before_rejected:
        raise LeftOut("left out: the answers follow different prompts")
    return RawPair(prompt + before_chosen, answer_chosen, answer_rejected)


def _answer(value: Any, column: str) -> tuple[tuple[Message, ...], str]:
    if isinstance(value, str):
        return (), value
    messages = _messages(value, column)
    if not messages:
        raise LeftOut("left out: empty answer")
    if messages[-1].role != "assistant":
        raise UserError(f'the last message of "{column}" is by "{messages[-1].role}"; the answer is the assistant\'s.')
    return messages[:-1], messages[-1].content


def _split_texts(row: Mapping[str, Any], chosen: str, rejected: str, separator: str) -> RawPair:
    if not chosen or not rejected:
        raise LeftOut("left out: empty answer")
    cut_chosen, cut_rejected = chosen.rfind(separator), rejected.rfind(separator)
    if cut_chosen < 0 or cut_rejected < 0:
        raise UserError(
            f"found the columns {_names(row)} and no {separator!r} inside the texts, so the prompt is unknown; "
            f'expected {EXPECTED}. An empty "prompt" declares that there is none.'
        )
    if chosen[:cut_chosen] != rejected[:cut_rejected]:
        raise LeftOut("left out: the answers follow different prompts")
    # HH-RLHF writes one space between the marker and the words; it belongs to the layout, not to the answer.
    answers = [text[cut_chosen + len(separator) :].removeprefix(" ") for text in (chosen, rejected)]
    return RawPair(_turns(chosen[:cut_chosen]), answers[0], answers[1])


def _turns(text: str) -> tuple[Message, ...]:
    """A dialogue in HH-RLHF's notation, or a single user message."""
    if not text:
        return ()
    if not text.startswith(HH_USER):
        return (Message("user", text),)
    messages = []
    for turn in text.split(HH_USER)[1:]:
        said, *replies = turn.split(HH_SEPARATOR)
        messages.append(Message("user", said.removeprefix(" ")))
        messages += [Message("assistant", reply.removeprefix(" ")) for reply in replies]
    return tuple(messages)


# ------------------------------------------------------------------------------------------------ columns


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    name = next((name for name in PROMPT_COLUMNS if _given(row, name)), None)
    if name is None:
        raise UserError(f"found the columns {_names(row)} and no prompt; expected {EXPECTED}.")
    value = row[name]
    messages: tuple[Message, ...]
    if isinstance(value, str):
        if name == "instruction" and isinstance(row.get("input"), str) and row["input"]:
            value = f"{value}\n{row['input']}"
        messages = (Message("user", value),) if value else ()
        if value.startswith(HH_USER) and value.rstrip().endswith(HH_SEPARATOR):
            messages = _turns(value.rstrip().removesuffix(HH_SEPARATOR))
    else:
        messages = _messages(value, name)
    system = row.get("system")
    if isinstance(system, str) and system and not any(message.role == "system" for message in messages):
        messages = (Message("system", system), *messages)
    return messages


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    found = []
    for item in _rows(value, column):
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise UserError(f'a message in "{column}" has the role {role!r}; known are {", ".join(ROLES)}.')
        if item.get("tool_calls") or item.get("function_call"):
            raise UserError(f'a message in "{column}" calls a tool; only texts can be trained on.')
        found.append(Message(ROLES[role.lower()], _content(content, column)))
    return tuple(found)


def _content(content: Any, column: str) -> str:
    if isinstance(content, list):  # parts, as multimodal data has them
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(texts) == len(content):
            return "".join(texts)
    if not isinstance(content, str):
        raise UserError(f'a message in "{column}" has the content {str(content)[:60]!r}; it must be text.')
    return content


def _rows(value: Any, column: str) -> list[dict[str, Any]]:
    """A list of records. TFDS and older Hugging Face features make it a record of lists; one may stand bare."""
    if isinstance(value, dict):
        lists = list(value.values())
        if lists and all(isinstance(item, list) for item in lists) and len({len(item) for item in lists}) == 1:
            return [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]
        return [value]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise UserError(f'"{column}" is {str(value)[:60]!r}; expected a text or a list of messages.')


def _given(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None


def _names(columns: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in columns) or "(none)"


def _refuse_token_ids(row: Mapping[str, Any]) -> None:
    def ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)

    known = [name for pair in ANSWER_COLUMNS for name in pair] + list(PROMPT_COLUMNS)
    tokenized = [name for name in row if (name.endswith("input_ids") or name in known) and ids(row[name])]
    if tokenized and not ("chosen" in row and "chosen" not in tokenized):
        raise UserError(
            f"the columns {_names(tokenized)} hold token ids; two tokenizers are to read the text, so give the text."
        )


def _checked(pair: RawPair) -> RawPair:
    for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not isinstance(text, str):
            raise UserError(f'"{name}" is {str(text)[:60]!r}; it must be text.')
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise LeftOut("left out: empty answer")
    if pair.chosen == pair.rejected:
        raise LeftOut("left out: identical answers")
    try:
        "".join([pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, written as a JSON escape: no tokenizer can read it
        raise LeftOut("left out: text with a lone surrogate") from None
    return pair
