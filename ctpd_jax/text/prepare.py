"""Preference pairs -> pairs that both models can read: prompts fitted, responses aligned, cut and closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctpd_jax import preempt
from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, Aligned, AlignedPair, Counters, Message, PreferencePair
from ctpd_jax.text.prompts import FittedPrompt, PromptTooLong, TextModel, fit_prompt, last_user
from ctpd_jax.text.spans import align_batch, truncate, with_end_of_turn
from ctpd_jax.text.tokens import can_spell, merges_across, special_literals

BATCH = 1024  # pairs tokenized at a time: enough for the tokenizer's threads, small enough for memory


@dataclass(frozen=True)
class Limits:
    """How much of a pair is kept; the token limits hold for both models."""

    prompt: int
    response: int  # end-of-turn included
    unit: Literal["character", "byte"] = "character"
    end_of_turn: bool = True


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
        preempt.check("the data are prepared anew")
        part = spelt[first : first + BATCH]
        texts = [text for pair in part for text in (pair.chosen, pair.rejected)]
        aligned = align_batch(texts, teacher.tokenizer, student.tokenizer, unit=limits.unit)
        kept: list[tuple[PreferencePair, FittedPrompt]] = []
        for number, pair in enumerate(part):
            both = (aligned[2 * number], aligned[2 * number + 1])
            found = _prepare(pair, both, teacher, student, limits, counters)
            if found is not None:
                prepared.append(found[0])
                kept.append((pair, found[1]))
        _count_texts(kept, teacher, student, counters)
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
) -> tuple[AlignedPair, FittedPrompt] | None:
    try:
        prompt = fit_prompt(pair, teacher, student, limits.prompt, limits.prompt)
    except PromptTooLong:
        counters.add("left out: template longer than the prompt limit")
        return None
    room = limits.response - int(limits.end_of_turn)
    closed = []
    for response in aligned:
        short, cut = truncate(response, room, room)
        if short.num_spans == 0:
            counters.add("left out: no common boundary within the response limit")
            return None
        if limits.end_of_turn and not cut:  # a response cut short must not teach to stop there
            short = with_end_of_turn(short, teacher.end_of_turn, student.end_of_turn)
        closed.append((short, cut))
    sizes = [len(text.encode("utf-8")) for text in (pair.chosen, pair.rejected)]
    for (short, cut), size in zip(closed, sizes):
        counters.add("responses")
        counters.add("responses cut", cut)
        counters.add("spans", short.num_spans)
        counters.add("teacher tokens", len(short.teacher.ids))
        counters.add("student tokens", len(short.student.ids))
        counters.add("bytes", size)
        counters.add("bytes kept", short.bounds[-1])
    if prompt.dropped:
        counters.add("prompts cut")
        counters.add("prompt characters cut", prompt.dropped)
    ready = AlignedPair(
        id=pair.id,
        teacher_prompt=prompt.teacher,
        student_prompt=prompt.student,
        chosen=closed[CHOSEN][0],
        rejected=closed[REJECTED][0],
        chosen_bytes=sizes[CHOSEN],
        rejected_bytes=sizes[REJECTED],
        truncated=(closed[CHOSEN][1], closed[REJECTED][1]),
        dropped=prompt.dropped,
    )
    return ready, prompt


def _count_texts(
    kept: Sequence[tuple[PreferencePair, FittedPrompt]], teacher: TextModel, student: TextModel, counters: Counters
) -> None:
    """What each tokenizer's own reading of the texts had to be kept from."""
    responses = [text for pair, _ in kept for text in (pair.chosen, pair.rejected)]
    texts = [*responses, *(message.content for pair, _ in kept for message in pair.prompt)]
    for name, model in (("teacher", teacher), ("student", student)):
        ends = [getattr(prompt, f"{name}_end") for _, prompt in kept for _ in (CHOSEN, REJECTED)]
        merged = merges_across(model.tokenizer, ends, responses)
        escaped = sum(special_literals(model.tokenizer, text) for text in texts)
        counters.add(f"{name} tokens that would merge across the prompt's border", merged)
        counters.add(f"{name} literal special tokens escaped", escaped)


def steered_prompt(pair: PreferencePair, dropped: int, instruction: str) -> list[Message]:
    """Returns the prompt, `dropped` characters shorter as it was fitted, with `instruction` before what is left.

    This is how one model is made a good and a bad teacher by its prompt alone.
    """
    messages = list(pair.prompt) or [Message("user", "")]
    user = last_user(messages)
    last = len(messages) - 1 if user is None else user
    messages[last] = Message(messages[last].role, f"{instruction}\n\n{messages[last].content[dropped:]}")
    return messages
