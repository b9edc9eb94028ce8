"""Preference pairs -> pairs that both models can read: prompts fitted, responses aligned, cut and closed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ctpd_jax.errors import UserError
from ctpd_jax.processes import preempt
from ctpd_jax.schema import CHOSEN, REJECTED, Aligned, AlignedPair, Counters, Message, PreferencePair
from ctpd_jax.text.columns import LeftOut
from ctpd_jax.text.prompts import FittedPrompt, PromptTooLong, TextModel, fit_prompt, last_user, opened_block
from ctpd_jax.text.spans import align_batch, truncate, with_end_of_turn
from ctpd_jax.text.tokens import can_spell, merges_across

ONE_SIDE_CUT = "pairs without end of turn, one side cut"
RULES = 2  # raise it when this room makes other tokens or spans of the same pairs; tests/text/test_rules.py tells
BATCH = 1024  # pairs tokenized at a time: enough for the tokenizer's threads, small enough for memory


@dataclass(frozen=True)
class Limits:
    """How much of a pair is kept; the token limits hold for both models."""

    prompt: int
    response: int  # end-of-turn included
    unit: Literal["character", "byte"] = "character"
    end_of_turn: bool = True
    end_of_turn_both: bool = True  # on both responses of a pair or on neither

    @classmethod
    def of(cls, data: Any) -> Limits:
        """Take what config.data says."""
        return cls(data.max_prompt_tokens, data.max_response_tokens, data.unit, data.end_of_turn, data.end_of_turn_both)

    @property
    def where_one_is_cut(self) -> str:
        """Say which responses of a pair end their turn where the limit cuts one of the two."""
        both = self.end_of_turn_both or not self.end_of_turn
        return "end of turn on neither side" if both else "end of turn on the other side alone"


def prepare_pairs(
    pairs: Sequence[PreferencePair],
    teacher: TextModel,
    student: TextModel,
    limits: Limits,
    done: Callable[[int], object] = lambda number: None,
) -> tuple[list[AlignedPair], Counters]:
    """Align every pair. A pair that cannot be used is left out and counted, with the first of each reason.

    `done` is told how many more pairs have been looked at.

    Raises UserError where no pair is left.
    """
    parts = parts_of(pairs)
    return gathered(parts, (prepare_part(part, teacher, student, limits) for part in parts), done)


Part = tuple[list[AlignedPair], Counters]


def parts_of(pairs: Sequence[PreferencePair]) -> list[Sequence[PreferencePair]]:
    """Cut pairs into those that are prepared together."""
    return [pairs[first : first + BATCH] for first in range(0, len(pairs), BATCH)]


def gathered(parts: Sequence[Sequence[PreferencePair]], found: Iterable[Part], done: Callable[[int], object]) -> Part:
    """Return all that was found in the parts, which come in their order. Raises UserError where that is nothing."""
    counters = Counters()
    prepared: list[AlignedPair] = []
    for part, (own, counted) in zip(parts, found, strict=True):
        prepared += own
        counters.merge(counted)
        done(len(part))
        preempt.check("the data are prepared anew")
    if not prepared:
        raise UserError(
            f"None of {sum(map(len, parts))} pairs is left after tokenization ({counters.reasons()}); "
            "where the limits are the reason, raise data.max_prompt_tokens or data.max_response_tokens."
        )
    counters.add("pairs", len(prepared))
    return prepared, counters


def prepare_part(part: Sequence[PreferencePair], teacher: TextModel, student: TextModel, limits: Limits) -> Part:
    """Align some pairs; what cannot be used is left out and counted."""
    counters = Counters()
    prepared: list[AlignedPair] = []
    kept: list[tuple[PreferencePair, FittedPrompt]] = []
    # 1. Responses are tokenized together, prompts one by one.
    for pair, both in zip(part, _aligned(part, teacher, student, limits.unit)):
        try:
            if isinstance(both, LeftOut):
                raise both
            ready, prompt = _prepare(pair, both, teacher, student, limits, counters)
        except LeftOut as reason:
            counters.leave_out(reason.reason, pair.source or pair.id, reason.detail)
            continue
        prepared.append(ready)
        kept.append((pair, prompt))
    # 2. What is worth knowing of the texts that are used.
    for name, model in (("teacher", teacher), ("student", student)):
        _count_texts(name, model, kept, counters)
    return prepared, counters


Both = tuple[Aligned, Aligned]


def _aligned(
    pairs: Sequence[PreferencePair], teacher: TextModel, student: TextModel, unit: Literal["character", "byte"]
) -> list[Both | LeftOut]:
    """Align both responses of each pair, tokenized together where nothing is wrong with any of them."""
    spelt = [_can_spell(pair, teacher) and _can_spell(pair, student) for pair in pairs]
    texts = [text for pair, fine in zip(pairs, spelt) if fine for text in (pair.chosen, pair.rejected)]
    # What one text does wrong ends the whole batch: then each pair is tried by itself.
    try:
        aligned = align_batch(texts, teacher.tokenizer, student.tokenizer, unit=unit)
    except UserError as error:
        if len(pairs) == 1:
            return [LeftOut("tokens that do not spell the text", str(error))]
        return [found for pair in pairs for found in _aligned([pair], teacher, student, unit)]
    both = iter(zip(aligned[::2], aligned[1::2]))
    return [next(both) if fine else LeftOut("characters that a vocabulary lacks") for fine in spelt]


def _can_spell(pair: PreferencePair, model: TextModel) -> bool:
    texts = [pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]
    return all(can_spell(model.tokenizer, text) for text in texts)


def _prepare(
    pair: PreferencePair, aligned: Both, teacher: TextModel, student: TextModel, limits: Limits, counters: Counters
) -> tuple[AlignedPair, FittedPrompt]:
    """Cut and close one pair. Raises LeftOut, and then nothing of it is counted."""
    # 1. The prompt, and then the responses.
    try:
        prompt = fit_prompt(pair, teacher, student, limits.prompt, limits.prompt)
    except PromptTooLong:
        raise LeftOut("template longer than the prompt limit") from None
    except UserError as error:
        what = "no prompt can be made of the messages" if pair.prompt else "an empty prompt predicts nothing"
        raise LeftOut(what, str(error).removeprefix(f"{pair.source or pair.id}: ")) from None
    closed, one_side = _closed(aligned, teacher, student, limits)
    # 2. The counts.
    sizes = [len(text.encode("utf-8")) for text in (pair.chosen, pair.rejected)]
    for (short, cut), size in zip(closed, sizes):
        counters.add("responses")
        counters.add("responses cut", cut)
        counters.add("spans", short.num_spans)
        counters.add("teacher tokens", len(short.teacher.ids))
        counters.add("student tokens", len(short.student.ids))
        counters.add("bytes", size)
        counters.add("bytes kept", short.bounds[-1])
    if one_side:
        counters.add(one_side)
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
        weight=pair.weight,
        margin=pair.margin,
    )
    return ready, prompt


def _closed(
    aligned: Both, teacher: TextModel, student: TextModel, limits: Limits
) -> tuple[list[tuple[Aligned, bool]], str]:
    """Return both responses within the limit, whether each was cut, and what is to be counted where one alone was.

    A response cut short must not teach to stop there. Where only the other one ended its turn, the loss would push
    stopping up or down with no counterpart, and the sums of an evaluation would be as lopsided.
    """
    # 1. Within the limit, with room for the end of the turn.
    room = limits.response - int(limits.end_of_turn)
    short = [truncate(response, room, room) for response in aligned]
    if any(response.num_spans == 0 for response, _ in short):
        raise LeftOut("no common boundary within the response limit")
    # 2. The ends of turn.
    cuts = [cut for _, cut in short]
    neither = not limits.end_of_turn or (limits.end_of_turn_both and any(cuts))
    closed = []
    for response, cut in short:
        if not cut and not neither:
            response = with_end_of_turn(response, teacher.end_of_turn, student.end_of_turn)
        closed.append((response, cut))
    # 3. Pairs that differ only in what was cut teach nothing.
    ids = [[*response.teacher.ids, -1, *response.student.ids] for response, _ in closed]
    if ids[CHOSEN] == ids[REJECTED]:
        raise LeftOut("answers identical within the response limit")
    if not limits.end_of_turn or len(set(cuts)) == 1:
        return closed, ""
    return closed, ONE_SIDE_CUT if limits.end_of_turn_both else "pairs with end of turn on one side, one side cut"


def _count_texts(
    name: str, model: TextModel, kept: Sequence[tuple[PreferencePair, FittedPrompt]], counters: Counters
) -> None:
    """Count what a tokenizer's own reading of the texts had to be kept from, and thoughts that are never closed."""
    responses = [text for pair, _ in kept for text in (pair.chosen, pair.rejected)]
    texts = [*responses, *(message.content for pair, _ in kept for message in pair.prompt)]
    ends = [getattr(prompt, f"{name}_end") for _, prompt in kept for _ in (CHOSEN, REJECTED)]
    # The names of control tokens, which as somebody's words are encoded as ordinary text.
    escaped = sum(len(model.tokenizer.control_pattern.findall(text)) for text in texts)
    counters.add(f"{name} tokens that would merge across the prompt's border", _merges(model, ends, responses))
    counters.add(f"{name} literal special tokens escaped", escaped)
    # A prompt may open a thought that the answer is to close.
    for end, response in zip(ends, responses):
        block = opened_block(end)
        if block and f"<{block}>" in response:
            what = "is opened again by the answer"
        elif block and f"</{block}>" not in response:
            what = "is not closed by the answer"
        else:
            continue
        counters.add(f"{name} prompt opens <{block}>, which {what} (template_variables may close it)")


def _merges(model: TextModel, ends: Sequence[str], responses: Sequence[str]) -> int:
    """Do `merges_across`; what cannot even be spelt as one text counts as merged."""
    try:
        return merges_across(model.tokenizer, ends, responses)
    except UserError:
        return 1 if len(ends) == 1 else sum(_merges(model, [end], [text]) for end, text in zip(ends, responses))


def steered_prompt(pair: PreferencePair, dropped: int, instruction: str) -> list[Message]:
    """Return the prompt, `dropped` characters shorter as it was fitted, with `instruction` before what is left.

    This is how one model is made a good and a bad teacher by its prompt alone.
    """
    messages = list(pair.prompt) or [Message("user", "")]
    user = last_user(messages)
    last = len(messages) - 1 if user is None else user
    messages[last] = Message(messages[last].role, f"{instruction}\n\n{messages[last].content[dropped:]}")
    return messages
