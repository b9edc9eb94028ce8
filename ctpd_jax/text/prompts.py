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
from ctpd_jax.text import tokens
from ctpd_jax.text.backends import encoded, stand_in
from ctpd_jax.text.templates import Piece, PromptTemplate, load_template, marks_for, render_chat, render_prompt
from ctpd_jax.text.tokens import TextTokenizer


class PromptTooLong(UserError):
    """A prompt that exceeds a limit even without its last user message."""


@dataclass(frozen=True)
class TextModel:
    """A model as the text rooms see it: tokenizer, template, and the token that ends its turn."""

    tokenizer: TextTokenizer
    template: PromptTemplate
    end_of_turn: int

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Return the token ids of a prompt, int32 [T], T >= 1. Raises UserError as `encode_prompt` does.

        Of a chat template these are the ids of transformers' `apply_chat_template`: what the template writes, and no
        BOS beside it.
        """
        return self.encode(render_prompt(self.template, messages))

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Do `prompt` for what is rendered already."""
        return encode_prompt(self.tokenizer, pieces, bos=self.template.kind == "plain")


def load_text_model(path: str, template: str = "auto", template_variables: str = "") -> TextModel:
    """Load the tokenizer of a folder or hub id, and its template; the arguments are those of `load_template`."""
    tokenizer = tokens.load_tokenizer(path)
    chosen = load_template(tokenizer, template, template_variables=template_variables)
    end = end_of_turn_id(tokenizer, chosen)
    used = frame_tokens(tokenizer, chosen)
    if end in tokenizer.added:
        used.add(tokenizer.added[end].content)
    model = TextModel(tokens.with_control(tokenizer, used), chosen, end)
    _try_prompts(model)
    return model


def end_of_turn_id(tokenizer: TextTokenizer, template: PromptTemplate) -> int:
    """Return the token with which an assistant ends its turn.

    That is the added token that the chat template puts after the answer, white space aside, else EOS. Raises UserError
    where neither is there, or the template refuses every conversation.
    """
    # What the template itself puts after an answer goes before what the tokenizer calls its end.
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
    """Return what a template writes after an answer, in the first conversation where it writes something."""
    mark, asked = "\ue0f1", "\ue0f2"
    question = Message("user", asked)
    talk = [question, Message("assistant", mark)]
    refusals = []
    conversations = (talk, [Message("system", asked), *talk], [*talk, question])
    for turns in conversations:
        try:
            text = render_chat(template, turns, ask=False)
        except UserError as error:
            refusals.append(error)
            continue
        after = (text.rpartition(mark)[2] if mark in text else "").lstrip()
        if turns[-1] is not question and after:
            return after
        # Some close an answer only where something follows, and some write nothing but what opens the next question.
        opening = tokenizer.added_pattern.findall(text.partition(asked)[0])[-1:]
        closing = tokenizer.added_pattern.match(after)
        if closing and closing.group() not in opening:
            return after
    if len(refusals) == len(conversations):
        raise UserError(f"The tokenizer {tokenizer.name!r}: {refusals[0]}")
    return ""


def frame_tokens(tokenizer: TextTokenizer, template: PromptTemplate) -> set[str]:
    """Return the added tokens with which a chat template frames its turns, flagged as special or not.

    Those that it writes into an answer, such as <think>, frame none: an answer may well hold them. They are known by
    coming in pairs with no message between them, be it in an empty block or in a system prompt that speaks of them.
    Nor do mere words and white space, which some vocabularies add too: Gemma has line ends.
    """
    found: set[str] = set()
    inner: set[str] = set()
    if template.kind == "plain":
        return found
    for roles in (("user",), ("user", "assistant", "user"), ("system", "user", "assistant", "user")):
        try:
            text = render_chat(template, marks_for(roles)[0], ask=False)
        except UserError:  # many a template takes no system message
            continue
        found.update(token for token in tokenizer.added_pattern.findall(text) if re.search(r"[^\w\s\u2581]", token))
        # A pair such as <think></think> with no message inside.
        for block in re.finditer(r"(<(\w+)>)[^\ue0f1]*?(</\2>)", text):
            inner.update(block.group(1, 3))
    return found - inner


_CONVERSATIONS = (
    [Message("user", "Hi, 2 + 2?")],
    [Message("user", " Tell me\n\nmore. "), Message("assistant", "No\u00e9l \U0001f600"), Message("user", "why")],
    [Message("system", "Be kind."), Message("user", "x\n")],
)


def _try_prompts(model: TextModel) -> None:
    """Hold the ids of `encode_beside_typed` against those of the tokenizer itself where nothing was typed."""
    for turns in _CONVERSATIONS if model.template.kind == "chat" else ():
        try:
            pieces = render_prompt(model.template, turns)
        except UserError:
            continue
        if encode_beside_typed(model.tokenizer, pieces) != model.encode(pieces).tolist():
            raise UserError(
                f"The tokenizer {model.tokenizer.name!r} cannot be copied: a prompt of its chat template would get "
                "other tokens where somebody types a control token's name."
            )


# ------------------------------------------------------------------------------------------------ token ids


def encode_prompt(tok: TextTokenizer, pieces: Sequence[Piece], bos: bool = True) -> np.ndarray:
    """Encode a rendered prompt as int32 [T], T >= 1.

    Only pieces of the template may hold control tokens: what a user typed never becomes one, not even together with
    the template text beside it. Where nobody typed one, these are the ids that the tokenizer gives the whole text.

    bos: put the tokenizer's BOS in front, exactly once, if its own post-processor adds one. A chat template writes its
    own.
    Raises UserError for an empty prompt without BOS: nothing would predict the response's first token; and if the
    tokens do not spell the prompt.
    """
    whole = "".join(piece.text for piece in pieces)
    tokens.require_readable(tok, whole)
    # The tokenizer itself reads the whole prompt, if it takes nothing that was typed for a control token: no name, and
    # nothing that its normalizer makes one.
    ids, written = None, [token_id for _, token_id in _parts(tok, pieces) if token_id is not None]
    if _only_template_control(tok, whole, pieces):
        ids = encoded(tok.backend, [whole], tok.name)[0].ids
    if ids is None or [token_id for token_id in ids if token_id in tok.control_names] != written:
        ids = encode_beside_typed(tok, pieces)
    ids = tokens.spelling_of(tok, ids, whole, control=True).ids.tolist()
    if bos and tok.bos_id is not None and ids[:1] != [tok.bos_id]:
        ids = [tok.bos_id, *ids]
    if not ids:
        raise UserError(
            f"the prompt is empty and the tokenizer {tok.name!r} adds no BOS, so nothing predicts the first token of "
            "the response; give the pair a prompt or the model a template."
        )
    return np.array(ids, np.int32)


def _only_template_control(tok: TextTokenizer, whole: str, pieces: Sequence[Piece]) -> bool:
    """Tell whether every control token that can be read in the whole prompt lies inside one piece of the template."""
    edges = list(accumulate((len(piece.text) for piece in pieces), initial=0))
    for match in tok.control_pattern.finditer(whole):
        number = bisect_right(edges, match.start()) - 1
        if not pieces[number].special or match.end() > edges[number + 1]:
            return False
    return True


def _parts(tok: TextTokenizer, pieces: Sequence[Piece]) -> list[tuple[str, int | None]]:
    """Return the prompt as texts, beside each its id if it is a control token of the template's."""
    parts: list[tuple[str, int | None]] = []
    for text, special in pieces:
        place = 0
        for match in tok.added_pattern.finditer(text) if special else ():
            if match.group() in tok.control:
                parts += [(text[place : match.start()], None), (match.group(), tok.control[match.group()])]
                place = match.end()
        parts.append((text[place:], None))
    return parts


def encode_beside_typed(tok: TextTokenizer, pieces: Sequence[Piece]) -> list[int]:
    """Encode a prompt in which somebody typed a control token's name.

    The tokenizer's copy reads it, to which such a name is ordinary text. The template's own control tokens are written
    as stand-ins, which the copy looks for as the original looks for the tokens: with the same flags.
    """
    parts = _parts(tok, pieces)
    while True:
        # 1. The text with stand-ins, and where each of them lies in it.
        written = [text if token_id is None else stand_in(token_id) for text, token_id in parts]
        edges = list(accumulate(map(len, written), initial=0))
        encoding = encoded(tok.ordinary, ["".join(written)], tok.name, offsets=True)[0]
        read = [span for number, span in zip(encoding.ids, encoding.offsets) if number in tok.stand_ins]
        # 2. A token that is looked for after a space only, say, may be none here to the original either: it is text.
        missed = False
        for key, (text, token_id) in enumerate(parts):
            if token_id is not None and not any(a < edges[key + 1] and edges[key] < b for a, b in read):
                parts[key] = (text, None)
                missed = True
        if not missed:
            return [tok.stand_ins.get(number, number) for number in tokens.without_control(tok, encoding.ids)]


# ------------------------------------------------------------------------------------------------ limits


class FittedPrompt(NamedTuple):
    """One prompt for both models, within both limits."""

    teacher: np.ndarray  # int32 [Tp]
    student: np.ndarray  # int32 [Tq]
    teacher_end: str  # the last characters of the rendered text, as many as decide what merges with a response
    student_end: str
    dropped: int  # characters cut from the left of the last user message


def opened_block(text: str) -> str | None:
    """Return the name of a tag with which a prompt ends, as in "<think>": the answer goes on in it, and closes it."""
    found = re.search(r"<([A-Za-z_]+)>\s*\Z", text)
    return found[1] if found else None


def last_user(messages: Sequence[Message]) -> int | None:
    """Return the index of the last user message: the one that is cut, or led by an instruction."""
    return max((index for index, message in enumerate(messages) if message.role == "user"), default=None)


def fit_prompt(
    pair: PreferencePair, teacher: TextModel, student: TextModel, max_teacher: int, max_student: int
) -> FittedPrompt:
    """Return both models' prompt ids, the last user message shortened from its left until both limits hold.

    Both models lose the same characters, and the template loses none. The limits are in tokens, BOS and template
    included. Raises PromptTooLong where the rest of the prompt alone exceeds a limit, else UserError as
    `TextModel.prompt` does.
    """
    last = last_user(pair.prompt)

    def cut(dropped: int) -> FittedPrompt:
        messages = list(pair.prompt)
        if last is not None:
            messages[last] = Message("user", messages[last].content[dropped:])
        pieces = [render_prompt(model.template, messages) for model in (teacher, student)]
        ends = ["".join(piece.text for piece in each)[-tokens.BORDER :] for each in pieces]
        return FittedPrompt(teacher.encode(pieces[0]), student.encode(pieces[1]), ends[0], ends[1], dropped)

    def fits(found: FittedPrompt) -> bool:
        return len(found.teacher) <= max_teacher and len(found.student) <= max_student

    try:
        # 1. The whole prompt, or else the one without its last user message: all or nothing.
        whole = cut(0)
        if fits(whole):
            return whole
        best = cut(len(pair.prompt[last].content) if last is not None else 0)
        if not fits(best):
            raise PromptTooLong(
                f"the prompt without its last user message has {len(best.teacher)} teacher and {len(best.student)} "
                f"student tokens, the limits are {max_teacher} and {max_student}; raise "
                "data.max_prompt_tokens or leave the pair out."
            )
        # 2. In between: what is cut at `best` fits, at `low` it does not.
        low = 0
        while best.dropped - low > 1:
            middle = cut((low + best.dropped) // 2)
            if fits(middle):
                best = middle
            else:
                low = middle.dropped
        return best
    except UserError as error:
        raise type(error)(f"{pair.source or pair.id}: {error}") from None
