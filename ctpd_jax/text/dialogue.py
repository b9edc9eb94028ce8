"""Conversations as data sets write them -> messages: lists of records, HH-RLHF's notation, rendered chat templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ctpd_jax.schema import Counters, Message
from ctpd_jax.text.columns import LISTS, LeftOut, Reading, empty, from_json, harmless, require_understood

HH_SEPARATOR = "\n\nAssistant:"
HH_USER = "\n\nHuman:"

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


# ------------------------------------------------------------------------------------------------ records


def messages(value: Any, column: str, reading: Reading) -> tuple[Message, ...]:
    """Read a list of {"role", "content"} (ShareGPT: "from", "value").

    Raises LeftOut for a role or a field that is not understood, and for what is no text.
    """
    found = []
    for item in map(dict, records(from_json(value), column)):
        # What is read is taken out; what is left must not change the meaning.
        role = item.pop("role") if "role" in item else item.pop("from", None)
        content = item.pop("content") if "content" in item else item.pop("value", None)
        require_understood(item, reading, "field of a message", said=(content,))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise LeftOut("a message has an unknown role", f"the role {str(role)[:30]!r} in {column!r}")
        found.append(Message(ROLES[role.lower()], _content(content, column, reading)))
    return tuple(found)


def _content(content: Any, column: str, reading: Reading) -> str:
    # Multimodal data have a list of parts; one that is no text is refused below.
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = []
        for part in map(dict, content):
            text, kind = part.pop("text", None), part.pop("type", "text")
            if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
                break
            require_understood(part, reading, "field of a message's part")
            texts.append(text)
        else:
            return "".join(texts)
    if not isinstance(content, str):
        raise LeftOut("a message's content must be text", f"{str(content)[:60]!r} in {column!r}")
    return content


def records(value: Any, column: str) -> list[dict[str, Any]]:
    """Read a list of records. TFDS and older Hugging Face features make it a record of lists; one may stand bare."""
    if isinstance(value, dict):
        lists = list(value.values())
        if all(isinstance(item, list) for item in lists) and len(set(map(len, lists))) == 1:
            return [dict(zip(value, items)) for items in zip(*lists)]
        return [value]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise LeftOut(
        "neither a text nor a list of messages", f"expected a text or a list of messages, not {str(value)[:60]!r}"
    )


def history(value: Any, reading: Reading) -> tuple[Message, ...]:
    """Read what was said before the prompt: messages, or [[user, assistant], ...]."""
    value = from_json(value, LISTS)
    if not isinstance(value, list) or not all(isinstance(turn, list) for turn in value):
        return messages(value, "history", reading)
    # The older form: pairs of what the user said and what was answered.
    said = []
    for turn in value:
        if len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise LeftOut("history is no list of a user's text and an answer")
        said += [Message("user", turn[0]), Message("assistant", turn[1])]
    return tuple(said)


# ------------------------------------------------------------------------------------------------ HH-RLHF

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_MARKER = re.compile(r"^[ \t]*(?:Human|Assistant):", re.MULTILINE)


def is_dialogue(text: str) -> bool:
    """Tell whether a text is in HH-RLHF's notation, well or badly."""
    return _HH_MARKER.match(text.lstrip()) is not None


def turns(text: str) -> tuple[Message, ...]:
    """Read a dialogue in HH-RLHF's notation up to where an answer follows, or a single user message.

    Raises LeftOut where the assistant speaks first, or a marker stands inside a turn: whose words those are is a guess.
    """
    if not is_dialogue(text):
        return (Message("user", text),) if text else ()
    _, *parts = _HH_TURN.split("\n\n" + text.lstrip())
    # An "Assistant:" at the end only asks for the answer.
    if len(parts) > 2 and parts[-2] == "Assistant" and not parts[-1].strip():
        parts = parts[:-2]
    if parts[0] == "Assistant":
        raise LeftOut("a dialogue that the assistant begins")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(roles[speaker], _unmarked(words.removeprefix(" "))) for speaker, words in zip(parts[::2], parts[1::2])
    )


def dialogue_answer(text: str, report: Counters) -> str:
    """Cut an answer in a dialogue where the user's next turn begins."""
    answer, cut, _ = text.removeprefix(" ").partition(HH_USER)  # the space belongs to the notation
    if cut:
        report.add("answers cut where the user speaks again")
    return _unmarked(answer)


def _unmarked(text: str) -> str:
    if _HH_MARKER.search(text):
        raise LeftOut('"Human:" or "Assistant:" begins a line inside a turn')
    return text


# ------------------------------------------------------------------------------------------------ chat templates

_BEGIN = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|startoftext|>")
_END = (
    *("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>", "</s>", "<eos>"),
    *("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
)
_HEADER = re.compile(
    r"<\|im_start\|>[ \t]*(\w+)[ \t]*\n?|<\|start_header_id\|>(\w+)<\|end_header_id\|>\n*|<start_of_turn>(\w+)\n?"
    r"|<\|(system|user|assistant)\|>\n?|<｜(User|Assistant)｜>|(\[/?INST\])[ \t]*"
)
_BOS_AMID = "<s>"  # Llama 2 begins every question with one
_SYSTEM = re.compile(r"<<SYS>>\n?(.*?)\n?<</SYS>>\s*", re.DOTALL)


def carries_template(value: Any) -> bool:
    """Tell whether a text, or one of those in a value, begins or ends with a marker of a chat template."""
    if isinstance(value, dict):
        return any(map(carries_template, value.values()))
    if isinstance(value, list):
        return any(map(carries_template, value))
    if not isinstance(value, str):
        return False
    text = value.strip()
    return text.startswith(_BEGIN) or text.endswith((*_END, "[/INST]")) or _HEADER.match(text) is not None


def without_template(row: Mapping[str, Any]) -> dict[str, Any]:
    """Parse rendered conversations into messages, and take the markers off the ends of other texts."""
    found = {}
    for name, value in row.items():
        if not harmless(name, value):
            value = from_json(value)
            value = _rendered_turns(value) if isinstance(value, str) and _HEADER.search(value) else _stripped(value)
        found[name] = value
    return found


def _stripped(value: Any) -> Any:
    """Take off the markers at the ends of every text, and the white space outside them."""
    if isinstance(value, dict):
        return {name: _stripped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    if not isinstance(value, str):
        return value
    while value.lstrip().startswith(_BEGIN):
        value = next(value.lstrip().removeprefix(mark) for mark in _BEGIN if value.lstrip().startswith(mark))
    while value.rstrip().endswith(_END):
        value = next(value.rstrip().removesuffix(mark) for mark in _END if value.rstrip().endswith(mark))
    return value


def _rendered_turns(text: str) -> Any:
    """Parse "<|im_start|>user\\nQ<|im_end|>..." into [{"role": "user", "content": "Q"}, ...]."""
    # 1. Each header opens a turn; before the first one nothing may stand.
    marks = list(_HEADER.finditer(text))
    if not empty(_stripped(text[: marks[0].start()])):
        raise LeftOut("a chat template's markers that cannot be read", text[:60])
    # 2. Each turn goes to the next header, without the markers around its words.
    found = []
    for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)]):
        role = next(group for group in mark.groups() if group).lower()
        role = {"[inst]": "user", "[/inst]": "assistant"}.get(role, role)
        said = text[mark.end() : end]
        said = _stripped(said if role == "user" else said.removesuffix(_BOS_AMID))
        if "INST" in mark.group():
            said = said.rstrip(" \t")  # Llama 2 writes a space before its marks
        if role == "user" and (system := _SYSTEM.match(said)):
            found.append({"role": "system", "content": system[1]})
            said = said[system.end() :]
        if role != "system" or not empty(said):
            found.append({"role": role, "content": said})
    # 3. The last header may only ask for an answer.
    if len(found) > 1 and found[-1]["role"] in ("assistant", "model") and empty(found[-1]["content"]):
        found.pop()
    return found
