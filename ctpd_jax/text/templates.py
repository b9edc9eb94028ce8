"""Each model's own prompt text around the same messages.

A prompt is a list of pieces: the template's own text, in which `<|im_end|>` is a special token, and the text of the
messages, in which it is ten ordinary characters. The response is never rendered: it follows the prompt verbatim, for
both models, as it does in generation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import jinja2
import jinja2.meta

from ctpd_jax.buckets.objects import at_hand
from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message
from ctpd_jax.text import sandbox
from ctpd_jax.text.sandbox import TEMPLATE_DATE
from ctpd_jax.text.tokens import TextTokenizer

PLAIN_SEPARATOR = "\n\n"
_OURS = {"messages", "add_generation_prompt"}
_OPEN, _CLOSE = "\ue0f5", "\ue0f6"  # around the words of a message
_STOP = "\ue0f3\ue0f4 "  # marks where a prefilled answer stops; its space shows whether the template trims


class Piece(NamedTuple):
    """A stretch of a prompt. `special`: the template's own text, whose special tokens are special."""

    text: str
    special: bool


@dataclass(frozen=True)
class PromptTemplate:
    """How one model wants to be asked.

    "chat": `source` is a Jinja chat template in Hugging Face's dialect, `variables` are the special tokens it may name,
    `settings` a JSON object of what else it is told.
    "plain": `source` is the separator. A single user message is followed by it; in a conversation every turn is
    "Role: text" + separator, and "Assistant:" on a line of its own asks for the answer.
    """

    kind: Literal["chat", "plain"]
    source: str
    variables: tuple[tuple[str, str], ...] = ()
    settings: str = "{}"
    name: str = field(default="", compare=False)  # of its file or tokenizer, for messages

    @property
    def called(self) -> str:
        """Say which template it is, at the beginning of a sentence."""
        return f'The chat template of "{self.name}"' if self.name else "The chat template"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the rendered text."""
        content = [self.kind, self.source, sorted(self.variables), self.settings, TEMPLATE_DATE.isoformat()]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def load_template(tokenizer: TextTokenizer, choice: str = "auto", template_variables: str = "") -> PromptTemplate:
    """Load the template of a model.

    Args:
      tokenizer: the model's tokenizer; it brings the chat templates and the names of the special tokens.
      choice: "auto" (the tokenizer's chat template if it has one, else plain), "chat", "chat:NAME" where it brings
        several, "plain", or a .jinja file.
      template_variables: a JSON object of variables that the chat template knows, such as {"enable_thinking": false}.

    Raises:
      UserError: "chat" without a chat template, several of which none is the default, a file that is not there, a
        template that is not valid Jinja, or a variable that it does not know.
    """
    # 1. The source: of the tokenizer, or of a file.
    kind, _, wanted = choice.partition(":")
    name, own = tokenizer.name, tokenizer.hf.chat_template or {}
    named = own if isinstance(own, dict) else {"default": own}
    if choice == "plain" or (choice == "auto" and not named):
        if template_variables:
            raise UserError(f'The template of "{name}" is plain and takes no variables; template_variables has some.')
        return PromptTemplate("plain", PLAIN_SEPARATOR)
    own_one = kind in ("auto", "chat")
    source = _own_template(named, wanted, name) if own_one else _template_of_file(choice)
    name = name if own_one else choice
    source = source.removeprefix("\ufeff")  # of some editors, and it would stand in every prompt
    # 2. Whether it is a template.
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        reason = f", line {error.lineno}: {error.message}"
        raise UserError(f'The chat template of "{name}" is not valid Jinja{reason}') from None
    except Exception as error:  # of Python's numbers, or of the Python that Jinja writes, whose lines say nothing
        raise UserError(f'The chat template of "{name}" is not valid Jinja: {error}') from None
    # 3. What it is told.
    special = {key: str(value) for key, value in tokenizer.hf.special_tokens_map.items() if isinstance(value, str)}
    told = _settings(source, template_variables, name)
    return PromptTemplate("chat", source, tuple(sorted(special.items())), told, name)


def _own_template(named: dict[str, str], wanted: str, name: str) -> str:
    """Return the template called `wanted`, else "default", else the only one."""
    if not named:
        raise UserError(f'The tokenizer "{name}" has no chat template; set the template to "plain" or a .jinja file.')
    found = named.get(wanted or "default")
    if found is None and not wanted and len(named) == 1:
        (found,) = named.values()
    if found is None:
        names = ", ".join(f'"chat:{each}"' for each in sorted(named))
        raise UserError(
            f'The tokenizer "{name}" has several chat templates and none called "{wanted or "default"}"; set the '
            f"template to one of {names}."
        )
    return found


def _template_of_file(choice: str) -> str:
    path = at_hand(choice)
    if path.suffix != ".jinja" or not path.is_file():
        raise UserError(
            f'The template "{choice}" is none of "auto", "chat", "chat:NAME", "plain", nor an existing .jinja file.'
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f'The template "{choice}" is not UTF-8: {error.reason} at byte {error.start}.') from None


def _settings(source: str, template_variables: str, name: str) -> str:
    """Return the user's variables as canonical JSON. One that the template does not know would change nothing."""

    def no_number(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        chosen = json.loads(template_variables or "{}", parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"template_variables = {template_variables!r} is not valid JSON: {error}.") from None
    if not isinstance(chosen, dict):
        raise UserError(f"template_variables = {template_variables!r} is not a JSON object of variables.")
    # A variable that a template reads without setting it is one that it can be told.
    known = jinja2.meta.find_undeclared_variables(sandbox.ChatEnvironment().parse(source)) - _OURS
    for key in chosen:
        if key not in known:
            raise UserError(
                f'template_variables sets {key!r}, which the chat template of "{name}" does not use; it uses '
                f"{', '.join(sorted(known)) or 'none'}."
            )
    return json.dumps(dict(sorted(chosen.items())))  # inside of a value a template may print the order


def told_source(template: PromptTemplate) -> str:
    """Write what a template is told into it: whoever asks otherwise later is heard, nobody has to ask."""
    told = json.loads(template.settings)
    lines = [f"{{% set {key} = {key} if {key} is defined else {value!r} %}}\n" for key, value in told.items()]
    return "".join([*lines, template.source])


# ------------------------------------------------------------------------------------------------ rendering


def render_prompt(template: PromptTemplate, messages: Sequence[Message]) -> list[Piece]:
    """Return the pieces of a prompt, up to where the response starts; joined they are what the template renders.

    Raises UserError where it refuses the messages, leaves one out, repeats one, or changes its own text with them.
    """
    if template.kind == "plain":
        return _plain_pieces(template.source, messages)
    whole = _prompt_text(template, messages)
    if not messages:
        return _pieces([whole], [])
    # The first parting whose pieces are the whole text again is the right one.
    for frame, contents in _partings(template, messages):
        pieces = _pieces(frame, contents)
        if "".join(piece.text for piece in pieces) == whole:
            return pieces
    raise UserError(f"{template.called} changes one message with another; give another template.")


def _partings(template: PromptTemplate, messages: Sequence[Message]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield ways to tell the template's own text from the messages', the cheapest first."""
    # 1. With placeholders, once for each sequence of roles. Nearly every template leaves a message as it is, or trims.
    frame, order = _frame(template, tuple(message.role for message in messages))
    yield frame, [messages[index].content for index in order]
    yield frame, [messages[index].content.strip() for index in order]
    # 2. With marks around the words of each message, where the template's own text depends on them.
    around, words = _amid_marks(template, messages)
    yield around, words
    yield around, [each.strip() for each in words]
    # 3. With one message at a time rendered for real, where the template edits them.
    contents = _edited(template, messages)
    yield frame, [contents[index] for index in order]


def _plain_pieces(separator: str, messages: Sequence[Message]) -> list[Piece]:
    if not messages:
        return []
    if len(messages) == 1 and messages[0].role == "user":
        return _pieces(["", separator], [messages[0].content])
    labels = [f"{message.role.capitalize()}: " for message in messages]
    asks = "" if messages[-1].role == "assistant" else f"{separator}Assistant:\n"
    frame = [labels[0], *(separator + label for label in labels[1:]), asks]
    return _pieces(frame, [message.content for message in messages])


def marks_for(roles: Sequence[str]) -> tuple[list[Message], list[str]]:
    """Return messages whose contents are marks, and the marks: private letters that no template looks for or trims."""
    marks = [f"\ue0f1{index}\ue0f2" for index in range(len(roles))]
    return list(map(Message, roles, marks)), marks


@lru_cache(maxsize=1024)
def _frame(template: PromptTemplate, roles: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Return a template's own text around messages of these roles, and which message stands in each gap."""
    marked, marks = marks_for(roles)
    around = _prompt_text(template, marked)
    for index, mark in enumerate(marks):
        if around.count(mark) != 1:
            what = "leaves out" if mark not in around else "repeats"
            raise UserError(f"{template.called} {what} message {index + 1} of the prompt; give another template.")
    parts = re.split("(" + "|".join(marks) + ")", around)
    return parts[::2], [marks.index(mark) for mark in parts[1::2]]


def _amid_marks(template: PromptTemplate, messages: Sequence[Message]) -> tuple[list[str], list[str]]:
    """Return a template's own text around these very messages, and their words; white space counts as its own.

    A message that is empty, or that holds a switch such as "/no_think", may change the template's own text, and one
    that is nothing else is left without marks. One text and no words if the marks do not come back in pairs.
    """
    # Marks that no text holds stand around each message's words, and show where the template put them.
    marked = []
    for message in messages:
        words, content = message.content.strip(), message.content
        if not re.fullmatch(r"(/\w+\s*)*", words):
            content = content.replace(words, f"{_OPEN}{words}{_CLOSE}", 1)
        marked.append(Message(message.role, content))
    parts = re.split(f"([{_OPEN}{_CLOSE}])", _prompt_text(template, marked))
    if parts[1::2] != [_OPEN, _CLOSE] * (len(parts) // 4):
        return ["".join(parts)], []
    return parts[::4], parts[2::4]


def _edited(template: PromptTemplate, messages: Sequence[Message]) -> list[str]:
    """Return what a template makes of each message, rendered for real amid marks."""
    marked, marks = marks_for([message.role for message in messages])
    around = _prompt_text(template, marked)
    contents = []
    for index, message in enumerate(messages):
        before, after = around.split(marks[index])
        text = _prompt_text(template, [*marked[:index], message, *marked[index + 1 :]])
        if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
            raise UserError(f"{template.called} changes its own text with message {index + 1}; give another template.")
        contents.append(text[len(before) : len(text) - len(after)])
    return contents


def _pieces(frame: Sequence[str], contents: Sequence[str]) -> list[Piece]:
    """Return frame[0] contents[0] frame[1] contents[1] ... frame[-1], without what is empty."""
    pieces = [Piece(frame[0], True)]
    for content, text in zip(contents, frame[1:], strict=True):
        pieces += [Piece(content, False), Piece(text, True)]
    return [piece for piece in pieces if piece.text]


def _prompt_text(template: PromptTemplate, messages: Sequence[Message]) -> str:
    """Render a chat prompt up to the opening of the answer, or up to where a prefilled answer stops."""
    if not messages or messages[-1].role != "assistant":
        return render_chat(template, messages)
    last = Message("assistant", messages[-1].content + _STOP)
    text = render_chat(template, [*messages[:-1], last], ask=False)
    before, found, after = text.rpartition(_STOP.strip())
    if not found or messages[-1].content.strip() not in text:
        raise UserError(f"{template.called} leaves out the answer that the prompt begins, or a part of it.")
    # A template that trims messages has trimmed the mark's space, and would have trimmed the answer's.
    return before if after.startswith(" ") else before.rstrip()


def render_chat(template: PromptTemplate, messages: Sequence[Message], ask: bool = True) -> str:
    """Render a chat template, with the opening of an answer at its end if `ask`."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    told = {"tools": None, "documents": None, **dict(template.variables), **json.loads(template.settings)}
    try:
        with sandbox.limited(sum(len(message.content) for message in messages)):
            return _compiled(template.source).render(messages=turns, add_generation_prompt=ask, **told)
    except sandbox.TooMuch as error:
        raise UserError(f"{template.called} was stopped: {error}; give another template.") from None
    except Exception as error:  # a template may divide by zero, or take a list for a text
        roles = ", ".join(message.role for message in messages) or "none"
        raise UserError(f"{template.called} refuses the messages (roles: {roles}): {error}") from None


_compiled = lru_cache(maxsize=256)(sandbox.compiled)
