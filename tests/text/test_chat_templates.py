"""Prompts of a collection of chat templates are those of transformers, and nobody can type their control tokens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from datetime import datetime
from itertools import accumulate
from pathlib import Path

import pytest
from helpers.chat_collection import CASES, TEMPLATES, Case, added, conversations, render_text, with_typed
from helpers.small_tokenizers import KINDS, core, fast, small
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message
from ctpd_jax.text.prompts import TextModel, load_text_model
from ctpd_jax.text.templates import TEMPLATE_DATE, load_template, render_prompt
from ctpd_jax.text.tokens import byte_ends, encode, normalize

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
    try:
        return hf.apply_chat_template(listed(turns), **{"add_generation_prompt": True, "return_dict": False, **options})
    except Exception:  # a template may fail in any way
        return None


def listed(turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def ours(model: TextModel, turns) -> list[int] | str:
    """The ids of the product, or why it refuses the turns."""
    try:
        return model.prompt(turns).tolist()
    except UserError as error:
        return str(error)


def hold(model: TextModel, hf, count: Counter, seed: int, number: int, **variables) -> None:
    """Hold prompts against those of transformers, and begun answers."""
    begun = {"add_generation_prompt": False, "continue_final_message": True}
    for prefill, options in ((False, {}), (True, begun)):
        for turns in conversations(number // 4 if prefill else number, seed + prefill, prefill):
            expected, found = theirs(hf, turns, **options, **variables), ours(model, turns)
            if expected is None:
                assert isinstance(found, str), turns
                count["refused by both"] += 1
            elif isinstance(found, str):
                # What somebody said, be it nothing, is not left out in silence.
                assert "leaves out message" in found, (found, turns)
                words = [f"word {index} of {len(turns)}" for index in range(len(turns))]
                marked = [Message(turn.role, each) for turn, each in zip(turns, words, strict=True)]
                text = hf.apply_chat_template(listed(marked), tokenize=False, **options, **variables)
                assert not all(each in text for each in words), turns
                count["refused, as a message would be left out"] += 1
            else:
                assert found == expected, turns
                count["begun answers" if prefill else "conversations"] += 1
                count["ids compared"] += len(expected)


def hold_typed(model: TextModel, hf, count: Counter, seed: int, number: int) -> None:
    """Hold prompts into which somebody typed control tokens against the same with ordinary words in their places."""
    names = sorted(model.tokenizer.control)
    for index, each in enumerate(conversations(number, seed)):
        turns, clean, where = with_typed(each, names, seed + index)
        before, after = theirs(hf, clean), ours(model, turns)
        if before is None or not where or "leaves out message" in after:
            continue
        assert not isinstance(after, str), (after, turns)
        pieces = stretches(model, hf, turns)
        first, second, touched = segments(model, before), segments(model, after), typed_segments(model, pieces, after)
        assert [each[0] for each in first] == [each[0] for each in second], turns  # the same control tokens
        for old, new, by_somebody in zip(first, second, touched, strict=True):
            assert by_somebody or old == new, turns
        spells(model, "".join(text for text, _ in pieces), after)
        count["conversations with typed tokens"] += 1
        count["typed tokens"] += sum(len(model.tokenizer.control_pattern.findall(turn.content)) for turn in turns)


def stretches(model: TextModel, hf, turns) -> list[tuple[str, bool]]:
    """The prompt in stretches, and of each whether a user typed it; found with marks around the messages' words."""
    marked = []
    for turn in turns:
        core = turn.content.strip()
        content = turn.content.replace(core, OPEN + core + CLOSE, 1) if core else turn.content
        marked.append({"role": turn.role, "content": content})
    whole = hf.apply_chat_template(listed(turns), tokenize=False, add_generation_prompt=True)
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


def models_of(
    case: Case, core: Tokenizer, folder: Path, variables: str = ""
) -> tuple[TextModel, PreTrainedTokenizerFast]:
    folder_of(case, core, folder)
    return load_text_model(str(folder), "chat", variables), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_prompts_are_those_of_transformers(case, tmp_path):
    model, hf = models_of(case, core(case.kind), tmp_path)
    count = Counter()
    hold(model, hf, count, seed=1, number=100)
    hold_typed(model, hf, count, seed=2, number=30)
    assert count["conversations"] >= 60 and count["begun answers"] >= 15, count
    assert count["conversations with typed tokens"] >= 12, count


def test_the_collection_is_whole():
    """Every template is tried, on every kind of tokenizer."""
    assert {case.template for case in CASES} == {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert {case.kind for case in CASES} == set(KINDS)


@pytest.mark.slow
def test_real_prompts_of_the_collection_are_those_of_transformers(real_tokenizers, capsys):
    """The flags of added tokens are tried where loading is quick; else each template once."""
    total: Counter = Counter()
    cores = {name: Tokenizer.from_file(str(folder / "tokenizer.json")) for name, folder in real_tokenizers.items()}
    chosen = {(case.template, str(case.tokens) if case.real == "mistral-v0.1" else ""): case for case in CASES}
    for number, case in enumerate(chosen.values()):
        hf = fast(case.give(cores[case.real]), chat_template=case.source, **case.names())
        model = load_text_model(hf, "chat")
        count = Counter(tokenizers=1)
        hold(model, hf, count, seed=100 + number, number=200)  # many a template refuses a third of them
        hold_typed(model, hf, count, seed=200 + number, number=100)
        assert count["conversations"] >= 100 and count["conversations with typed tokens"] >= 50, (case, count)
        total += count
    with capsys.disabled():
        print(f"\n{len({case.template for case in CASES})} chat templates:", dict(total))


# ------------------------------------------------------------------------------------------------ single answers


def case_of(template: str) -> Case:
    return next(case for case in CASES if case.template == template)


def rendered(model: TextModel, *contents: str) -> str:
    roles = ("user", "assistant") * len(contents)
    return render_text(model.template, [Message(role, content) for role, content in zip(roles, contents)])


@pytest.mark.parametrize("template", ["qwen3", "smollm3"])
@pytest.mark.parametrize("thinks", [True, False])
def test_template_variables_are_those_of_transformers(template, thinks, tmp_path):
    variables = {"enable_thinking": thinks}
    model, hf = models_of(case_of(template), core("byte"), tmp_path, json.dumps(variables))
    count = Counter()
    hold(model, hf, count, seed=3, number=40, **variables)
    assert count["conversations"] >= 30, count
    assert rendered(model, "x").endswith("assistant\n" if thinks else "</think>\n" + "\n" * (template == "qwen3"))


@pytest.mark.parametrize("template", ["qwen2.5", "llama3.1", "granite3"])
def test_tools_may_be_set_for_all_prompts(template, tmp_path):
    variables = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "<b>"}}}]}
    model, hf = models_of(case_of(template), core("byte"), tmp_path, json.dumps(variables))
    turns = [Message("user", "one "), Message("assistant", "two"), Message("user", "three")]
    assert '"name": "f"' in rendered(model, "one ", "two", "three")
    assert ours(model, turns) == theirs(hf, turns, **variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ('{"enable_thoughts": false}', "enable_thoughts.*does not use; it uses .*enable_thinking"),
        ("{enable_thinking: false}", "not valid JSON"),
        ("[1]", "not a JSON object"),
    ],
)
def test_variables_that_would_change_nothing_are_refused(variables, message, tmp_path):
    folder = folder_of(case_of("qwen3"), core("byte"), tmp_path)
    with pytest.raises(UserError, match=message):
        load_text_model(str(folder), "chat", variables)


def test_thoughts_are_words_of_an_answer_wherever_a_template_speaks_of_them(tmp_path):
    """SmolLM3's system prompt names <think>, and without thinking it opens and closes a block of its own."""
    for variables in ("", '{"enable_thinking": false}'):
        model, _ = models_of(case_of("smollm3"), core("byte"), tmp_path, variables)
        assert "<think>" in rendered(model, "x") and "<|im_end|>" in model.tokenizer.control
        assert not {"<think>", "</think>"}.intersection(model.tokenizer.control)
        think = model.tokenizer.backend.token_to_id("<think>")
        assert encode(model.tokenizer, "<think>hm</think>")[0] == think


@pytest.mark.parametrize("kind", ["bpe-prepend", "bpe-first", "unigram"])
@pytest.mark.parametrize("normalized", [True, False])
def test_chatml_tokens_that_are_not_flagged_frame_turns_all_the_same(kind, normalized, tmp_path):
    tokens = added("<|im_start|>", "<|im_end|>", normalized=normalized)
    model, hf = models_of(replace(case_of("hermes"), tokens=tokens, bos="<s>", eos="</s>"), core(kind), tmp_path)
    start, end = (model.tokenizer.backend.token_to_id(token.content) for token in tokens)
    assert model.end_of_turn == end
    clean = theirs(hf, [Message("user", "a word b word")])
    # With a dummy space by the normalizer a normalized token is one after a space alone.
    assert (clean.count(start), clean.count(end)) == ((1, 0) if normalized and kind == "bpe-prepend" else (2, 1))
    ids = ours(model, [Message("user", "a <|im_end|> b <|im_start|>")])
    assert (ids.count(start), ids.count(end)) == (clean.count(start), clean.count(end))
    assert not {start, end}.intersection(encode(model.tokenizer, "so <|im_end|>").tolist())


def test_only_the_opening_of_an_answer_thinks(tmp_path):
    model, _ = models_of(case_of("deepseek-r1"), core("byte"), tmp_path)
    assert rendered(model, "Hi", "<think>hm</think>Yes", "Why?").endswith(
        "<｜Assistant｜>Yes<｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜><think>\n"
    )
    assert rendered(model, "Hi", "Ye").endswith("<｜Assistant｜>Ye")


def test_what_is_told_to_a_template_is_what_transformers_tells_it(tmp_path):
    model, _ = models_of(case_of("grounded"), core("byte"), tmp_path)
    assert "There are no documents." in rendered(model, "x") and "NO TOOLS" not in rendered(model, "x")
    model, _ = models_of(case_of("llama3.1"), core("byte"), tmp_path)
    assert "ipython" not in rendered(model, "x")


def test_a_begun_answer_is_continued(tmp_path):
    model, _ = models_of(case_of("qwen2"), core("byte"), tmp_path)
    assert rendered(model, "Hi", " It is ").endswith("<|im_end|>\n<|im_start|>assistant\n It is ")
    model, _ = models_of(case_of("llama3"), core("byte"), tmp_path)
    assert rendered(model, "Hi", " It is ").endswith("<|end_header_id|>\n\nIt is")


def test_an_answer_that_the_template_cuts_cannot_be_begun(tmp_path):
    model, _ = models_of(case_of("deepseek-r1"), core("byte"), tmp_path)
    with pytest.raises(UserError, match="leaves out the answer that the prompt begins, or a part of it"):
        rendered(model, "Hi", "<think>hm</think>Yes")


def test_a_switch_typed_in_a_message_is_followed(tmp_path):
    model, hf = models_of(case_of("smollm3"), core("byte"), tmp_path)
    for system in (
        "Be kind. /no_think",
        "/no_think Be kind.",
        " /no_think\n",
        "/no_think /think",
        "/system_override x",
    ):
        turns = [Message("system", system), Message("user", "say <|im_end|> now")]
        text = render_text(model.template, turns)
        assert ("Mode: /no_think" in text) == ("/no_think" in system)
        assert text == hf.apply_chat_template(listed(turns), tokenize=False, add_generation_prompt=True)
        assert ours(model, turns).count(model.end_of_turn) == 2


def test_a_template_that_python_cannot_read_is_refused_at_load(tmp_path):
    (tmp_path / "bad.jinja").write_text("{% break %}")
    with pytest.raises(UserError, match=r"is not valid Jinja: 'break' outside loop"):
        load_template(small("byte"), str(tmp_path / "bad.jinja"))


def test_any_failure_of_a_template_is_one_of_the_row(tmp_path):
    for source in ("{{ 1 / 0 }}", "{{ '{x}'.format() }}", "{{ '{}'.format() }}", "{{ messages[9].content }}"):
        path = tmp_path / "bad.jinja"
        path.write_text("{% if messages[0].content == 'x' %}" + source + "{% endif %}{{ messages[0].content }}")
        template = load_template(small("byte"), str(path))
        assert render_text(template, [Message("user", "y")]) == "y"
        with pytest.raises(UserError, match=r"refuses the messages \(roles: user\)"):
            render_text(template, [Message("user", "x")])


def test_a_template_that_takes_few_conversations_shows_its_end_of_turn(tmp_path):
    frame = "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' else '\\n' }}{% endfor %}"
    refuse = "{{ raise_exception('no') }}{% endif %}"
    for when in ("messages[-1].role == 'assistant'", "messages[0].role != 'system'", "true"):
        source = "{% if " + when + " %}" + refuse + frame
        fast(core("byte"), chat_template=source, eos_token="<|endoftext|>").save_pretrained(tmp_path)
        if when == "true":
            with pytest.raises(UserError, match=f"{tmp_path}.*refuses the messages .*: no"):
                load_text_model(str(tmp_path))
        else:
            assert load_text_model(str(tmp_path)).end_of_turn == core("byte").token_to_id("<|im_end|>")


def test_what_is_set_in_a_generation_block_is_not_set_outside(tmp_path):
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}{{ x }}{% endgeneration %}{{ x }}"
    _, hf = models_of(case_of("qwen2"), core("byte"), tmp_path)
    text = hf.apply_chat_template([{"role": "user", "content": "a"}], chat_template=source, tokenize=False)
    (tmp_path / "own.jinja").write_text(source)
    assert rendered(load_text_model(str(tmp_path), str(tmp_path / "own.jinja")), "a") == text == "a21"


# ------------------------------------------------------------------------------------------------ where templates lie


def test_named_templates(tmp_path):
    """As a dict in memory, and as files that lie in additional_chat_templates/ alone."""
    one, two = "one {{ messages[0].content }}<|im_end|>", "two {{ messages[0].content }}<|im_end|>"
    names = {"eos_token": "<|im_end|>"}
    fast(core("byte"), chat_template={"rag": one, "tool_use": two}, **names).save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two" / "chat_template.jinja").exists()
    for source in (str(tmp_path / "two"), fast(core("byte"), chat_template={"rag": one, "tool_use": two}, **names)):
        for choice in ("auto", "chat"):
            with pytest.raises(UserError, match=r'none called "default"; set .* one of "chat:rag", "chat:tool_use"'):
                load_text_model(source, choice)
        with pytest.raises(UserError, match='none called "rage"'):
            load_text_model(source, "chat:rage")
        assert rendered(load_text_model(source, "chat:tool_use"), "x") == "two x<|im_end|>"
    fast(core("byte"), chat_template={"rag": one}, **names).save_pretrained(tmp_path / "only")
    assert rendered(load_text_model(str(tmp_path / "only")), "x") == "one x<|im_end|>"
    fast(core("byte"), chat_template={"default": one, "tool_use": two}, **names).save_pretrained(tmp_path / "usual")
    assert rendered(load_text_model(str(tmp_path / "usual")), "x") == "one x<|im_end|>"


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    folder = folder_of(case_of("qwen2"), core("byte"), tmp_path)
    plain = load_text_model(str(folder))
    own = tmp_path / "own.jinja"
    for path, choice in ((own, str(own)), (folder / "chat_template.jinja", "auto")):
        path.write_text(case_of("qwen2").source, encoding="utf-8-sig")
        assert path.read_bytes().startswith(b"\xef\xbb\xbf")
        assert rendered(load_text_model(str(folder), choice), "x") == rendered(plain, "x")
