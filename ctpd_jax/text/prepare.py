"""Preference pairs -> pairs that both models can read: prompts fitted, responses aligned, cut and closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, Aligned, AlignedPair, Counters, Message, PreferencePair
from ctpd_jax.text.spans import align_batch, truncate, with_end_of_turn
from ctpd_jax.text.templates import (
    PromptTemplate,
    PromptTooLong,
    end_of_turn_id,
    fit_prompt,
    load_template,
    prompt_ids,
    render_text,
)
from ctpd_jax.text.tokens import TextTokenizer, can_spell, load_tokenizer, merges_across

BORDER = 64  # characters before a response that decide whether it would merge with its prompt
BATCH = 1024  # pairs tokenized at a time: enough for the tokenizer's threads, small enough for memory


@dataclass(frozen=True)
class TextModel:
    """A model as the text rooms see it: tokenizer, template, and the token that ends its turn."""

    tokenizer: TextTokenizer
    template: PromptTemplate
    end_of_turn: int

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        return prompt_ids(self.tokenizer, self.template, messages)


@dataclass(frozen=True)
class Limits:
    """How much of a pair is kept; the token limits hold for both models."""

    prompt: int
    response: int  # end-of-turn included
    unit: Literal["character", "byte"] = "character"
    end_of_turn: bool = True


def load_text_model(path: str, template: str) -> TextModel:
    """Loads and probes a tokenizer, and its template ("auto", "chat", "plain" or a .jinja file)."""
    tokenizer = load_tokenizer(path)
    chosen = load_template(tokenizer, template)
    return TextModel(tokenizer, chosen, end_of_turn_id(tokenizer, chosen))


def prepare_pairs(
    pairs: Sequence[PreferencePair], teacher: TextModel, student: TextModel, limits: Limits
) -> tuple[list[AlignedPair], Counters]:
    """Aligns every pair. A pair that cannot be used is left out and counted.

    Raises:
      UserError: no pair is left.
    """
    counters = Counters()
    prepared: list[AlignedPair] = []
    spelt = [pair for pair in pairs if _can_spell(pair, teacher) and _can_spell(pair, student)]
    if len(spelt) < len(pairs):
        counters.add("left out: characters that a vocabulary lacks", len(pairs) - len(spelt))
    for first in range(0, len(spelt), BATCH):
        part = spelt[first : first + BATCH]
        texts = [text for pair in part for text in (pair.chosen, pair.rejected)]
        aligned = align_batch(texts, teacher.tokenizer, student.tokenizer, unit=limits.unit)
        for number, pair in enumerate(part):
            both = (aligned[2 * number], aligned[2 * number + 1])
            found = _prepare(pair, both, teacher, student, limits, counters)
            if found is not None:
                prepared.append(found)
    if not prepared:
        raise UserError(
            f"None of {len(pairs)} pairs is left after tokenization ({counters.counts}); "
            "raise data.max_prompt_tokens or data.max_response_tokens."
        )
    counters.add("pairs", len(prepared))
    return prepared, counters


def _can_spell(pair: PreferencePair, model: TextModel) -> bool:
    texts = [pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]
    return all(can_spell(model.tokenizer, text) for text in texts)


def _prepare(
    pair: PreferencePair,
    aligned: tuple[Aligned, Aligned],
    teacher: TextModel,
    student: TextModel,
    limits: Limits,
    counters: Counters,
) -> AlignedPair | None:
    try:
        teacher_prompt, student_prompt, dropped = fit_prompt(
            pair,
            (teacher.tokenizer, teacher.template),
            (student.tokenizer, student.template),
            limits.prompt,
            limits.prompt,
        )
    except PromptTooLong:
        counters.add("left out: template longer than the prompt limit")
        return None
    closed = []
    room = limits.response - int(limits.end_of_turn)
    for response in aligned:
        short, cut = truncate(response, room, room)
        if short.num_spans == 0:
            counters.add("left out: no common boundary within the response limit")
            return None
        if limits.end_of_turn and not cut:  # a response cut short must not teach to stop there
            short = with_end_of_turn(short, teacher.end_of_turn, student.end_of_turn)
        closed.append((short, cut))
        counters.add("responses")
        counters.add("responses cut", cut)
        counters.add("spans", short.num_spans)
        counters.add("teacher tokens", len(short.teacher.ids))
        counters.add("student tokens", len(short.student.ids))
        counters.add("bytes kept", short.bounds[-1])
    for name, model in (("teacher", teacher), ("student", student)):
        before = render_text(model.template, pair.prompt)[-BORDER:]
        merged = sum(merges_across(model.tokenizer, before, text) for text in (pair.chosen, pair.rejected))
        counters.add(f"{name} tokens that would merge across the prompt's border", merged)
    if dropped:
        counters.add("prompts cut")
        counters.add("prompt characters cut", dropped)
    sizes = [len(text.encode("utf-8")) for text in (pair.chosen, pair.rejected)]
    counters.add("bytes", sum(sizes))
    return AlignedPair(
        id=pair.id,
        teacher_prompt=teacher_prompt,
        student_prompt=student_prompt,
        chosen=closed[CHOSEN][0],
        rejected=closed[REJECTED][0],
        chosen_bytes=sizes[CHOSEN],
        rejected_bytes=sizes[REJECTED],
        truncated=(closed[CHOSEN][1], closed[REJECTED][1]),
        dropped=dropped,
    )


def steered_prompt(pair: PreferencePair, dropped: int, instruction: str) -> list[Message]:
    """Returns the prompt, `dropped` characters shorter as it was fitted, with `instruction` before what is left.

    This is how one model is made a good and a bad teacher by its prompt alone.
    """
    messages = list(pair.prompt) or [Message("user", "")]
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=len(messages) - 1)
    messages[last] = Message(messages[last].role, f"{instruction}\n\n{messages[last].content[dropped:]}")
    return messages
