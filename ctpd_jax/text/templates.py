"""Each model's own prompt text around the same messages.

A prompt is a list of pieces: the template's own text, in which `<|im_end|>` is a special token, and the text of the
messages, in which it is nine ordinary characters. The response is never rendered: it follows the prompt verbatim, for
both models, as it does in generation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message
from ctpd_jax.text.tokens import TextTokenizer

# Templates that print today's date would make another prompt of the same messages tomorrow; this is the date that
# Llama 3's own template falls back to.
TEMPLATE_DATE = datetime(2024, 7, 26)
DEFAULT_SEPARATOR = "\n\n"


class Piece(NamedTuple):
    """A stretch of a prompt. `special`: the template's own text, whose special tokens are special."""

    text: str
    special: bool


@dataclass(frozen=True)
class PromptTemplate:
    """How one model wants to be asked.

    "chat": `source` is a Jinja chat template in Hugging Face's dialect, `variables` are the special tokens it may name.
    "plain": `source` is the separator. A single user message is followed by it; in a conversation every turn is
    "Role: text" + separator, and "Assistant:" on a line of its own asks for the answer.
    """

    kind: Literal["chat", "plain"]
    source: str
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the rendered text."""
        content = [self.kind, self.source, sorted(self.variables), TEMPLATE_DATE.isoformat()]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def load_template(tokenizer: TextTokenizer, choice: str = "auto", separator: str = DEFAULT_SEPARATOR) -> PromptTemplate:
    """The template of a model.

    Args:
      tokenizer: the model's tokenizer; it brings the chat template and the names of the special tokens.
      choice: "auto" (the tokenizer's chat template if it has one, else plain), "chat", "plain", or a .jinja file.
      separator: ends the prompt and the turns of a plain template.

    Raises:
      UserError: "chat" without a chat template, a file that is not there, or a template that is not valid Jinja.
    """
    own = tokenizer.hf.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if choice == "plain" or (choice == "auto" and not own):
        return PromptTemplate("plain", separator)
    if choice in ("auto", "chat"):
        if not own:
            raise UserError(
                f'The tokenizer "{tokenizer.name}" has no chat template; set the template to "plain" or a .jinja file.'
            )
        source = own
    else:
        path = Path(choice).expanduser()
        if path.suffix != ".jinja" or not path.is_file():
            raise UserError(f'The template "{choice}" is none of "auto", "chat", "plain", nor an existing .jinja file.')
        source = path.read_text(encoding="utf-8")
    special = tokenizer.hf.special_tokens_map
    variables = tuple(sorted((name, str(value)) for name, value in special.items() if isinstance(value, str)))
    template = PromptTemplate("chat", source, variables)
    try:
        _compiled(template.source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f'The chat template of "{tokenizer.name}" is not valid Jinja, line {error.lineno}: {error.message}'
        ) from None
    return template


# ------------------------------------------------------------------------------------------------ rendering


def render_prompt(template: PromptTemplate, messages: Sequence[Message]) -> list[Piece]:
    """The pieces of a prompt, up to where the response starts.

    The template's own text is found with placeholders in place of the messages, once for each sequence of roles. A
    template may trim or edit what it is given; then each message is also rendered for real amid placeholders, which
    shows what becomes of it. In every case the whole, rendered for real, must be the pieces joined.

    Raises:
      UserError: the template refuses the messages, leaves one out, repeats one, or changes its own text with them.
    """
    if template.kind == "plain":
        return _plain_pieces(template.source, messages)
    whole = render_chat(template, messages)
    if not messages:
        return _pieces([whole], [])
    frame, order = _frame(template, tuple(message.role for message in messages))
    # Nearly every template leaves a message as it is, or trims it: then this one rendering is enough.
    for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
        pieces = _pieces(frame, [contents[index] for index in order])
        if "".join(piece.text for piece in pieces) == whole:
            return pieces
    contents = _edited(template, messages)
    pieces = _pieces(frame, [contents[index] for index in order])
    if "".join(piece.text for piece in pieces) != whole:
        raise UserError("The chat template changes one message with another; give another template.")
    return pieces


def render_text(template: PromptTemplate, messages: Sequence[Message]) -> str:
    """The prompt as one text."""
    return "".join(piece.text for piece in render_prompt(template, messages))


def _plain_pieces(separator: str, messages: Sequence[Message]) -> list[Piece]:
    if not messages:
        return []
    if len(messages) == 1 and messages[0].role == "user":
        return _pieces(["", separator], [messages[0].content])
    labels = [f"{message.role.capitalize()}: " for message in messages]
    frame = [labels[0], *(separator + label for label in labels[1:]), f"{separator}Assistant:\n"]
    return _pieces(frame, [message.content for message in messages])


@lru_cache(maxsize=1024)
def _frame(template: PromptTemplate, roles: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """A template's own text around and between messages of these roles, and which message stands in each gap."""
    masked, marks = _masked(roles)
    around = render_chat(template, masked)
    for index, mark in enumerate(marks):
        if around.count(mark) != 1:
            what = "leaves out" if mark not in around else "repeats"
            raise UserError(f"The chat template {what} message {index + 1} of the prompt; give another template.")
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", around)
    return parts[::2], [marks.index(mark) for mark in parts[1::2]]


def _masked(roles: Sequence[str]) -> tuple[list[Message], list[str]]:
    """Messages with a mark for their content: letters of the private use area, which no template looks for or trims."""
    marks = [f"\ue0f1{index}\ue0f2" for index in range(len(roles))]
    return [Message(role, mark) for role, mark in zip(roles, marks)], marks


def _edited(template: PromptTemplate, messages: Sequence[Message]) -> list[str]:
    """What a template makes of each message, each rendered for real amid marks."""
    masked, marks = _masked([message.role for message in messages])
    around = render_chat(template, masked)
    contents = []
    for index, message in enumerate(messages):
        before, after = around.split(marks[index])
        text = render_chat(template, [*masked[:index], message, *masked[index + 1 :]])
        if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
            raise UserError(f"The chat template changes its own text with message {index + 1}; give another template.")
        contents.append(text[len(before) : len(text) - len(after)])
    return contents


def _pieces(frame: Sequence[str], contents: Sequence[str]) -> list[Piece]:
    """frame[0] contents[0] frame[1] contents[1] ... frame[-1], without what is empty."""
    pieces = [Piece(frame[0], True)]
    for content, text in zip(contents, frame[1:], strict=True):
        pieces += [Piece(content, False), Piece(text, True)]
    return [piece for piece in pieces if piece.text]


def render_chat(template: PromptTemplate, messages: Sequence[Message], ask: bool = True) -> str:
    """A chat template's own rendering, with the opening of an answer at its end if `ask`."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return _compiled(template.source).render(messages=turns, add_generation_prompt=ask, **dict(template.variables))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in messages) or "none"
        raise UserError(f"The chat template refuses the messages (roles: {roles}): {error}") from None


_COMPILED: dict[str, jinja2.Template] = {}


def _compiled(source: str) -> jinja2.Template:
    """Hugging Face's dialect of Jinja, in a sandbox: a template comes with a model from anywhere."""
    if source not in _COMPILED:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
        _COMPILED[source] = environment.from_string(source)
    return _COMPILED[source]


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what an assistant says; here it is the text inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own would escape "<" as HTML does


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
