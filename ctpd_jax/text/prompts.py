"""What a model reads before a response: messages -> token ids, with exactly one BOS, cut to a limit on both sides."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message, PreferencePair
from ctpd_jax.text.templates import Piece, PromptTemplate, load_template, render_chat, render_prompt
from ctpd_jax.text.tokens import BORDER, TextTokenizer, load_tokenizer, require_unicode


class PromptTooLong(UserError):
    """A prompt that exceeds a limit even without its last user message."""


@dataclass(frozen=True)
class TextModel:
    """A model as the text rooms see it: tokenizer, template, and the token that ends its turn."""

    tokenizer: TextTokenizer
    template: PromptTemplate
    end_of_turn: int

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Token ids of a prompt, int32 [T], T >= 1; see `encode_prompt`. Raises UserError as `render_prompt` does."""
        return encode_prompt(self.tokenizer, render_prompt(self.template, messages))


def load_text_model(path: str, template: str = "auto") -> TextModel:
    """Loads and probes a tokenizer, and its template ("auto", "chat", "plain" or a .jinja file)."""
    tokenizer = load_tokenizer(path)
    chosen = load_template(tokenizer, template)
    return TextModel(tokenizer, chosen, end_of_turn_id(tokenizer, chosen))


def end_of_turn_id(tokenizer: TextTokenizer, template: PromptTemplate) -> int:
    """The token with which an assistant ends its turn: the special token that the chat template puts after the answer,
    white space aside, else EOS.

    Raises:
      UserError: neither is there.
    """
    if template.kind == "chat":
        mark = "\ue0f1"
        text = render_chat(template, [Message("user", "\ue0f2"), Message("assistant", mark)], ask=False)
        after = text.rpartition(mark)[2] if mark in text else ""
        added = tokenizer.template_backend.get_added_tokens_decoder()
        for number in tokenizer.template_backend.encode(after, add_special_tokens=False).ids:
            if number in added and added[number].special:
                if not after.partition(added[number].content)[0].strip():
                    return int(number)
                break
    if tokenizer.hf.eos_token_id is None:
        raise UserError(
            f'Neither the template nor the tokenizer "{tokenizer.name}" has a token for the end of a turn; set '
            "eos_token in its tokenizer_config.json."
        )
    return int(tokenizer.hf.eos_token_id)


# ------------------------------------------------------------------------------------------------ token ids


def encode_prompt(tok: TextTokenizer, pieces: Sequence[Piece]) -> np.ndarray:
    """A rendered prompt -> int32 [T], T >= 1, with BOS exactly once if the tokenizer's own post-processor adds one.

    Only pieces of the template may hold special tokens: what a user typed never becomes one, not even together with
    the template text beside it.

    Raises UserError for an empty prompt without BOS: nothing would predict the response's first token.
    """
    whole = "".join(piece.text for piece in pieces)
    require_unicode(tok, whole)
    if _only_template_specials(tok, whole, pieces):
        ids = tok.template_backend.encode(whole, add_special_tokens=False).ids
    else:
        ids = _encode_around_specials(tok, pieces)
    if tok.bos_id is not None and (not ids or ids[0] != tok.bos_id):
        ids = [tok.bos_id, *ids]
    if not ids:
        raise UserError(
            f"the prompt is empty and the tokenizer {tok.name!r} adds no BOS, so nothing predicts the first token of "
            "the response; give the pair a prompt or the model a template."
        )
    return np.array(ids, np.int32)


def _only_template_specials(tok: TextTokenizer, whole: str, pieces: Sequence[Piece]) -> bool:
    """Whether every special token that can be read in the whole prompt lies inside one piece of the template."""
    if tok.special_pattern is None:
        return True
    edges = list(accumulate((len(piece.text) for piece in pieces), initial=0))
    for match in tok.special_pattern.finditer(whole):
        number = bisect_right(edges, match.start()) - 1
        if not pieces[number].special or match.end() > edges[number + 1]:
            return False
    return True


def _encode_around_specials(tok: TextTokenizer, pieces: Sequence[Piece]) -> list[int]:
    """Special tokens of the template by id, all text between two of them as one ordinary text."""
    assert tok.special_pattern is not None
    ids: list[int] = []
    pending = ""
    at_start = True

    def flush() -> None:
        nonlocal pending, at_start
        if pending:
            backend = tok.backend if at_start else tok.middle_backend
            ids.extend(backend.encode(pending, add_special_tokens=False).ids)
        pending, at_start = "", False

    for text, special in pieces:
        place = 0
        for match in tok.special_pattern.finditer(text) if special else ():
            pending += text[place : match.start()]
            flush()
            ids.append(tok.special[match.group()])
            place = match.end()
        pending += text[place:]
    flush()
    return ids


# ------------------------------------------------------------------------------------------------ limits


class FittedPrompt(NamedTuple):
    """One prompt for both models, within both limits."""

    teacher: np.ndarray  # int32 [Tp]
    student: np.ndarray  # int32 [Tq]
    teacher_end: str  # the last characters of the rendered text, as many as decide what merges with a response
    student_end: str
    dropped: int  # characters cut from the left of the last user message


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
        ids = [encode_prompt(model.tokenizer, each) for model, each in zip((teacher, student), pieces)]
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
