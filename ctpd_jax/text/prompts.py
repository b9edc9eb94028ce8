"""What a model reads before a response: messages -> token ids, cut to a limit on both sides."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message, PreferencePair
from ctpd_jax.text.backends import stand_in
from ctpd_jax.text.templates import Piece, PromptTemplate, load_template, render_chat, render_prompt
from ctpd_jax.text.tokens import (
    BORDER,
    TextTokenizer,
    load_tokenizer,
    require_readable,
    spelling_of,
    with_control,
    without_control,
)


class PromptTooLong(UserError):
    """A prompt that exceeds a limit even without its last user message."""


@dataclass(frozen=True)
class TextModel:
    """A model as the text rooms see it: tokenizer, template, and the token that ends its turn."""

    tokenizer: TextTokenizer
    template: PromptTemplate
    end_of_turn: int

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Token ids of a prompt, int32 [T], T >= 1; see `encode_prompt`. Raises UserError as `render_prompt` does.

        Of a chat template these are the ids of transformers' `apply_chat_template`: what the template writes, and no
        BOS beside it.
        """
        return self.encode(render_prompt(self.template, messages))

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """`prompt` of what is rendered already."""
        return encode_prompt(self.tokenizer, pieces, bos=self.template.kind == "plain")


def load_text_model(path: str, template: str = "auto", template_variables: str = "") -> TextModel:
    """Load and probe a tokenizer, and its template.

    Args:
      path: a folder or hub id.
      template: "auto", "chat", "chat:NAME", "plain" or a .jinja file; see `load_template`.
      template_variables: a JSON object of what the template is to be told, such as {"enable_thinking": false}.
    """
    tokenizer = load_tokenizer(path)
    chosen = load_template(tokenizer, template, template_variables=template_variables)
    end = end_of_turn_id(tokenizer, chosen)
    used = frame_tokens(tokenizer, chosen)
    if end in tokenizer.added:
        used.add(tokenizer.added[end].content)
    model = TextModel(with_control(tokenizer, used), chosen, end)
    _try_prompts(model)
    return model


def end_of_turn_id(tokenizer: TextTokenizer, template: PromptTemplate) -> int:
    """The token with which an assistant ends its turn: the added token that the chat template puts after the answer,
    white space aside, else EOS.

    Raises:
      UserError: neither is there, or the template refuses every conversation.
    """
    if template.kind == "chat":
        found = tokenizer.added_pattern.match(_after_answer(tokenizer, template))
        if found:
            return tokenizer.ids_of_added[found.group()]
    if tokenizer.eos_id is None:
        raise UserError(
            f'Neither the template nor the tokenizer "{tokenizer.name}" has a token for the end of a turn; set '
            "eos_token in its tokenizer_config.json."
        )
    return tokenizer.eos_id


def _after_answer(tokenizer: TextTokenizer, template: PromptTemplate) -> str:
    """What a template writes after an answer, in the first conversation where it writes something."""
    mark, question = "\ue0f1", Message("user", "\ue0f2")
    talk = [question, Message("assistant", mark)]
    taken, refused = False, None
    for turns in (talk, [Message("system", "\ue0f2"), *talk], [*talk, question]):
        try:
            text = render_chat(template, turns, ask=False)
        except UserError as error:
            refused = refused or error
            continue
        taken = True
        after = (text.rpartition(mark)[2] if mark in text else "").lstrip()
        if turns[-1] is not question and after:
            return after
        # Some close an answer only where something follows, and some write nothing but what opens the next question.
        opening = tokenizer.added_pattern.findall(text.partition("\ue0f2")[0])[-1:]
        closing = tokenizer.added_pattern.match(after)
        if closing and closing.group() not in opening:
            return after
    if taken:
        return ""
    raise UserError(f"The tokenizer {tokenizer.name!r}: {refused}")


def frame_tokens(tokenizer: TextTokenizer, template: PromptTemplate) -> set[str]:
    """The added tokens with which a chat template frames its turns, whether they are flagged as special or not.

    Those that it writes into an answer, such as <think>, frame none: an answer may well hold them. They are known by
    coming in pairs with no message between them, be it in an empty block or in a system prompt that speaks of them.
    Nor do mere words and white space, which some vocabularies add too: Gemma has line ends.
    """
    if template.kind == "plain":
        return set()
    found: set[str] = set()
    inner: set[str] = set()
    for roles in (("user",), ("user", "assistant", "user"), ("system", "user", "assistant", "user")):
        marks = [Message(role, f"\ue0f1{index}\ue0f2") for index, role in enumerate(roles)]
        try:
            text = render_chat(template, marks, ask=False)
        except UserError:  # many a template takes no system message
            continue
        found.update(token for token in tokenizer.added_pattern.findall(text) if re.search(r"[^\w\s\u2581]", token))
        for block in re.finditer(r"(<(\w+)>)[^\ue0f1]*?(</\2>)", text):
            inner.update(block.group(1, 3))
    return found - inner


def _try_prompts(model: TextModel) -> None:
    """Holds the ids of the second way to read a prompt, for those with typed control tokens, against the first's."""
    for turns in _CONVERSATIONS if model.template.kind == "chat" else ():
        try:
            pieces = render_prompt(model.template, turns)
        except UserError:
            continue
        ids = model.encode(pieces).tolist()
        if encode_beside_typed(model.tokenizer, pieces) != ids:
            raise UserError(
                f"The tokenizer {model.tokenizer.name!r} cannot be copied: a prompt of its chat template would get "
                "other tokens where somebody types a control token's name."
            )


_CONVERSATIONS = (
    [Message("user", "Hi, 2 + 2?")],
    [Message("user", " Tell me\n\nmore. "), Message("assistant", "No\u00e9l \U0001f600"), Message("user", "why")],
    [Message("system", "Be kind."), Message("user", "x\n")],
)


# ------------------------------------------------------------------------------------------------ token ids


def encode_prompt(tok: TextTokenizer, pieces: Sequence[Piece], bos: bool = True) -> np.ndarray:
    """A rendered prompt -> int32 [T], T >= 1.

    bos: put the tokenizer's BOS in front, exactly once, if its own post-processor adds one. A chat template writes
        its own.

    Only pieces of the template may hold control tokens: what a user typed never becomes one, not even together with
    the template text beside it. Where nobody typed one, these are the ids that the tokenizer gives the whole text.

    Raises UserError for an empty prompt without BOS: nothing would predict the response's first token; and if the
    tokens do not spell the prompt.
    """
    whole = "".join(piece.text for piece in pieces)
    require_readable(tok, whole)
    if _only_template_control(tok, whole, pieces):
        ids = tok.backend.encode(whole, add_special_tokens=False).ids
    else:
        ids = encode_beside_typed(tok, pieces)
    ids = spelling_of(tok, ids, whole, control=True).tolist()
    if bos and tok.bos_id is not None and (not ids or ids[0] != tok.bos_id):
        ids = [tok.bos_id, *ids]
    if not ids:
        raise UserError(
            f"the prompt is empty and the tokenizer {tok.name!r} adds no BOS, so nothing predicts the first token of "
            "the response; give the pair a prompt or the model a template."
        )
    return np.array(ids, np.int32)


def _only_template_control(tok: TextTokenizer, whole: str, pieces: Sequence[Piece]) -> bool:
    """Whether every control token that can be read in the whole prompt lies inside one piece of the template."""
    if not tok.control_pattern.search(whole):
        return True
    edges = list(accumulate((len(piece.text) for piece in pieces), initial=0))
    for match in tok.control_pattern.finditer(whole):
        number = bisect_right(edges, match.start()) - 1
        if not pieces[number].special or match.end() > edges[number + 1]:
            return False
    return True


def encode_beside_typed(tok: TextTokenizer, pieces: Sequence[Piece]) -> list[int]:
    """The ids of a prompt in which somebody typed a control token's name.

    The tokenizer's copy reads it, to which such a name is ordinary text. The template's own control tokens are written
    as stand-ins, which the copy looks for as the original looks for the tokens: with the same flags.
    """
    tokens = _template_tokens(tok, pieces)
    while True:
        text, places = _with_stand_ins(tokens)
        encoding = tok.ordinary.encode(text, add_special_tokens=False)
        read = [span for number, span in zip(encoding.ids, encoding.offsets) if number in tok.stand_ins]
        missed = {key for key, (start, end) in places.items() if not any(a < end and start < b for a, b in read)}
        if not missed:
            return [tok.stand_ins.get(number, number) for number in without_control(tok, encoding.ids)]
        # A token that is looked for after a space only, say, is no token here to the original either.
        tokens = [(text, None if key in missed else token_id) for key, (text, token_id) in enumerate(tokens)]


def _template_tokens(tok: TextTokenizer, pieces: Sequence[Piece]) -> list[tuple[str, int | None]]:
    """A prompt as texts, and beside each the id if it is a control token of the template's."""
    parts: list[tuple[str, int | None]] = []
    for text, special in pieces:
        place = 0
        for match in tok.added_pattern.finditer(text) if special else ():
            if match.group() in tok.control:
                parts += [(text[place : match.start()], None), (match.group(), tok.control[match.group()])]
                place = match.end()
        parts.append((text[place:], None))
    return parts


def _with_stand_ins(parts: Sequence[tuple[str, int | None]]) -> tuple[str, dict[int, tuple[int, int]]]:
    """The prompt with stand-ins, and where each of them lies in it, in characters."""
    whole, places = "", {}
    for key, (text, token_id) in enumerate(parts):
        written = text if token_id is None else stand_in(token_id)
        if token_id is not None:
            places[key] = (len(whole), len(whole) + len(written))
        whole += written
    return whole, places


# ------------------------------------------------------------------------------------------------ limits


class FittedPrompt(NamedTuple):
    """One prompt for both models, within both limits."""

    teacher: np.ndarray  # int32 [Tp]
    student: np.ndarray  # int32 [Tq]
    teacher_end: str  # the last characters of the rendered text, as many as decide what merges with a response
    student_end: str
    dropped: int  # characters cut from the left of the last user message


def opened_block(text: str) -> str | None:
    """The name of a tag with which a prompt ends, as in "<think>": the answer is to go on in it, and to close it."""
    found = re.search(r"<([A-Za-z_]+)>\s*\Z", text)
    return found[1] if found else None


def last_user(messages: Sequence[Message]) -> int | None:
    """Index of the last user message: the one that is cut, or led by an instruction."""
    return max((index for index, message in enumerate(messages) if message.role == "user"), default=None)


def fit_prompt(
    pair: PreferencePair, teacher: TextModel, student: TextModel, max_teacher: int, max_student: int
) -> FittedPrompt:
    """Both models' prompt ids, the last user message shortened from its left until both limits hold.

    Both models lose the same characters, and the template loses none.

    Args:
      pair: its prompt is fitted.
      teacher, student: the models that read it.
      max_teacher, max_student: limits in tokens, BOS and template included.

    Raises:
      PromptTooLong: the rest of the prompt alone exceeds a limit.
      UserError: a template refuses the messages, or nothing predicts the first token of the response.
    """
    last = last_user(pair.prompt)
    length = len(pair.prompt[last].content) if last is not None else 0

    def cut(dropped: int) -> FittedPrompt:
        messages = list(pair.prompt)
        if last is not None:
            messages[last] = Message(messages[last].role, messages[last].content[dropped:])
        pieces = [render_prompt(model.template, messages) for model in (teacher, student)]
        ends = ["".join(piece.text for piece in each)[-BORDER:] for each in pieces]
        ids = [model.encode(each) for model, each in zip((teacher, student), pieces)]
        return FittedPrompt(ids[0], ids[1], ends[0], ends[1], dropped)

    def fits(found: FittedPrompt) -> bool:
        return len(found.teacher) <= max_teacher and len(found.student) <= max_student

    try:
        whole = cut(0)
        if fits(whole):
            return whole
        best = cut(length)
        if not fits(best):
            raise PromptTooLong(
                f"the prompt without its last user message has {len(best.teacher)} teacher and {len(best.student)} "
                f"student tokens, the limits are {max_teacher} and {max_student}; raise max_prompt or leave the pair "
                "out."
            )
        low = 0  # what is cut at `best` fits, at `low` it does not
        while best.dropped - low > 1:
            middle = cut((low + best.dropped) // 2)
            if fits(middle):
                best = middle
            else:
                low = middle.dropped
        return best
    except UserError as error:
        raise type(error)(f"{pair.source or pair.id}: {error}") from None
