"""Prompts of a collection of chat templates are those of transformers, and nobody can type their control tokens."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from itertools import accumulate
from pathlib import Path

import pytest
from chat_collection import CASES, TEMPLATES, Case, conversations, with_typed
from small_tokenizers import core
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message
from ctpd_jax.text.prompts import TextModel, load_text_model
from ctpd_jax.text.templates import TEMPLATE_DATE, render_prompt
from ctpd_jax.text.tokens import byte_ends, normalize

OPEN, CLOSE = "\ue100", "\ue101"
IDS = [f"{case.template}-{case.kind}-{number}" for number, case in enumerate(CASES)]


class StandingClock(datetime):
    @classmethod
    def now(cls, tz=None):
        return TEMPLATE_DATE


@pytest.fixture(autouse=True)
def standing_clock(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", StandingClock)


def folder_of(case: Case, core: Tokenizer, folder: Path) -> Path:
    """A tokenizer's folder with the case's tokens and template."""
    PreTrainedTokenizerFast(
        tokenizer_object=case.give(core), chat_template=case.source, **case.names()
    ).save_pretrained(folder)
    return folder


def theirs(hf, turns, **options) -> list[int] | None:
    """The ids of transformers; None if the template refuses the turns."""
    listed = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        found = hf.apply_chat_template(listed, **{"add_generation_prompt": True, "return_dict": False, **options})
    except Exception:
        return None
    return found


def ours(model: TextModel, turns) -> list[int] | None:
    try:
        return model.prompt(turns).tolist()
    except UserError:
        return None


def hold(model: TextModel, hf, count: Counter, seed: int, number: int) -> None:
    """Hold prompts against those of transformers: clean ones, begun answers, and typed control tokens."""
    for turns in conversations(number, seed):
        expected = theirs(hf, turns)
        assert ours(model, turns) == expected, turns
        count["conversations"] += 1
        count["refused by both"] += expected is None
        count["ids"] += len(expected or ())
    for turns in conversations(number // 4, seed + 1, prefill=True):
        expected = theirs(hf, turns, add_generation_prompt=False, continue_final_message=True)
        assert ours(model, turns) == expected, turns
        count["begun answers"] += expected is not None


def hold_typed(model: TextModel, hf, count: Counter, seed: int, number: int) -> None:
    """Type control tokens into conversations and hold the template's part against that of the clean ones."""
    names = sorted(model.tokenizer.control)
    for index, each in enumerate(conversations(number, seed)):
        turns, clean, where = with_typed(each, names, seed + index)
        before = theirs(hf, clean)
        if before is None or not where:
            continue
        after = ours(model, turns)
        assert after is not None, turns
        pieces = stretches(model, hf, turns)
        first, second = segments(model, before), segments(model, after)
        assert [each[0] for each in first] == [each[0] for each in second], turns  # the same control tokens
        typed = typed_segments(model, pieces, after)
        assert len(typed) == len(second)
        for old, new, touched in zip(first, second, typed):
            assert touched or old == new, turns
        spells(model, "".join(text for text, _ in pieces), after)
        count["typed"] += 1
        count["typed names"] += sum(model.tokenizer.control_pattern.findall(t.content).__len__() for t in turns)


def stretches(model: TextModel, hf, turns) -> list[tuple[str, bool]]:
    """The prompt in stretches, and of each whether a user typed it; found with marks around the messages' words."""
    marked = []
    for turn in turns:
        core = turn.content.strip()
        content = turn.content.replace(core, OPEN + core + CLOSE, 1) if core else turn.content
        marked.append({"role": turn.role, "content": content})
    listed = [{"role": turn.role, "content": turn.content} for turn in turns]
    whole = hf.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
    text = hf.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    marks = [character for character in text if character in (OPEN, CLOSE)]
    if marks != [OPEN, CLOSE] * text.count(OPEN) or text.replace(OPEN, "").replace(CLOSE, "") != whole:
        # The template edits what it is given.
        return [(piece.text, not piece.special) for piece in render_prompt(model.template, turns)]
    found = []
    for number, part in enumerate(text.split(OPEN)):
        typed, _, own = part.partition(CLOSE) if number else ("", "", part)
        found += [(typed, True), (own, False)]
    return [each for each in found if each[0]]


def segments(model: TextModel, ids: list[int]) -> list[list[int]]:
    """The ids from each control token to the next; what comes before the first begins with -1."""
    found = [[-1]]
    for token_id in ids:
        if token_id in model.tokenizer.control_names:
            found.append([])
        found[-1].append(token_id)
    return found


def typed_segments(model: TextModel, pieces: list[tuple[str, bool]], ids: list[int]) -> list[bool]:
    """Of each segment whether it holds typed words, by the place of its control token, which is the template's."""
    tok = model.tokenizer
    whole = normalize(tok, "".join(text for text, _ in pieces))
    data, ends = whole.encode(), byte_ends(tok, ids, whole, whole=True, control=True).tolist()
    borders = list(accumulate((len(normalize(tok, text).encode()) for text, _ in pieces), initial=0))
    touched = [False]
    places = [0]
    for index, token_id in enumerate(ids):
        if token_id in tok.control_names:
            start = ends[index - 1] if index else 0
            name = normalize(tok, tok.control_names[token_id]).encode()
            places.append(start + data[start : ends[index]].index(name))
            touched.append(False)
            owner = max(number for number, border in enumerate(borders[:-1]) if border <= places[-1])
            assert not pieces[owner][1] and places[-1] + len(name) <= borders[owner + 1]
    for number, (_, typed) in enumerate(pieces):
        if typed:
            for segment, (start, end) in enumerate(zip(places, [*places[1:], len(data) + 1])):
                touched[segment] |= borders[number] < end and start < borders[number + 1]
    return touched


def spells(model: TextModel, text: str, ids: list[int]) -> None:
    """The tokens' bytes, control tokens by their names, are the text; white space aside where tokens take it along."""
    tok = model.tokenizer
    spelled = b"".join(tok.control_names[i].encode() if i in tok.control_names else tok.token_bytes(i) for i in ids)
    found, expected = spelled.decode(), normalize(tok, text)
    if tok.prefix.present or any(token.lstrip or token.rstrip for token in tok.added.values()):
        found, expected = "".join(found.split()), "".join(expected.split())
    assert found == expected


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_prompts_are_those_of_transformers(case, tmp_path):
    folder, count = folder_of(case, core(case.kind), tmp_path), Counter()
    hf, model = PreTrainedTokenizerFast.from_pretrained(folder), load_text_model(str(folder), "chat")
    hold(model, hf, count, seed=1, number=100)
    hold_typed(model, hf, count, seed=2, number=100)
    assert count["conversations"] - count["refused by both"] >= 40 and count["begun answers"] >= 8, count
    assert count["typed"] >= 40, count
