"""Prompts as the models were trained on them; users cannot type special tokens; only the last question is cut."""

import hashlib
import json

import numpy as np
import pytest
from helpers.chat_collection import render_text
from tokenizers import Tokenizer
from toy.models import student_tokenizer, teacher_tokenizer
from toy.world import corpus
from transformers import PreTrainedTokenizerFast

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message, PreferencePair
from ctpd_jax.text import templates
from ctpd_jax.text.prompts import PromptTooLong, TextModel, end_of_turn_id, fit_prompt
from ctpd_jax.text.templates import Piece, PromptTemplate, load_template, render_prompt, told_source
from ctpd_jax.text.tokens import encode, load_tokenizer

ASK = (Message("user", "Tell me about tea."),)
TALK = (
    Message("system", "Be kind 🙂."),
    Message("user", "Hi"),
    Message("assistant", "Hello {{ you }}"),
    Message("user", "Tell me\nabout tea {% now %}"),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def texts():
    return list(corpus(number=300))


@pytest.fixture(scope="module")
def teacher(texts):
    """SentencePiece-like, BOS by post-processor and by template."""
    return load_tokenizer(teacher_tokenizer(texts))


@pytest.fixture(scope="module")
def student(texts):
    """Byte-level, ChatML, bos_token in name only."""
    return load_tokenizer(student_tokenizer(texts))


def prompt_ids(tokenizer, template, messages):
    return TextModel(tokenizer, template, end_of_turn=0).prompt(messages)


def chat(source, **variables):
    return PromptTemplate("chat", source, tuple(sorted(variables.items())))


def with_template(tokenizer, source):
    """The tokenizer with another chat template."""
    backend = Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
    names = {name: tokenizer.hf.special_tokens_map[name] for name in tokenizer.hf.special_tokens_map}
    return load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **names))


# ------------------------------------------------------------------------------------------------ rendering


def test_pieces_tell_template_from_user(student):
    pieces = render_prompt(load_template(student), ASK)
    assert pieces == [
        Piece("<|im_start|>user\n", True),
        Piece("Tell me about tea.", False),
        Piece("<|im_end|>\n<|im_start|>assistant\n", True),
    ]


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("messages", [ASK, TALK], ids=["ask", "talk"])
def test_chat_prompts_are_those_of_transformers(request, which, messages):
    tokenizer = request.getfixturevalue(which)
    template = load_template(tokenizer)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    assert render_text(template, messages) == tokenizer.hf.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    theirs = tokenizer.hf.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, template, messages).tolist() == list(theirs)


def test_a_trimming_template_trims_and_the_pieces_say_so(teacher):
    pieces = render_prompt(load_template(teacher), [Message("user", "  tea \n")])
    assert Piece("tea", False) in pieces


def test_a_template_may_edit_messages(student):
    source = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] | upper }}")
    messages = [Message("assistant", "hm</think>yes"), Message("user", "why")]
    assert [piece.text for piece in render_prompt(chat(source), messages) if not piece.special] == ["YES", "WHY"]


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{{ messages[-1]['content'] }}", TALK, "leaves out message 1"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", ASK, "repeats message 1"),
        (
            "{{ messages[0]['content'] }}{{ messages[0]['content'] | length }}",
            ASK,
            "changes its own text with message 1",
        ),
        ("{{ raise_exception('no system role') }}", TALK, r"roles: system, user, assistant, user\): no system role"),
        ("{{ messages[0]['role'] }}", (), "refuses the messages"),
        ("{{ messages[0]['content'] + 1 }}", ASK, "refuses the messages"),
        ("{{ messages.__class__.__mro__ }}", ASK, "refuses the messages"),
    ],
)
def test_templates_that_cannot_be_followed_are_refused(source, messages, message):
    with pytest.raises(UserError, match=message):
        render_prompt(chat(source), messages)


def test_a_template_is_read_once_for_each_sequence_of_roles(monkeypatch):
    """Of every further prompt only its own text is rendered, and only once."""
    rendered = []
    real = templates.render_chat
    monkeypatch.setattr(templates, "render_chat", lambda *args: rendered.append(args[1]) or real(*args))
    template = chat(CHATML + "{# of this test alone #}")
    assert render_text(template, TALK) == real(template, TALK)
    assert len(rendered) == 2
    for word in ("one", " two ", "three"):
        other = [*TALK[:-1], Message("user", word)]
        assert render_text(template, other) == real(template, other)
    assert len(rendered) == 5
    render_prompt(template, ASK)
    assert len(rendered) == 7


def test_a_template_that_listens_for_a_word_is_refused_also_after_it_was_read():
    template = chat("Q: {{ messages[0]['content'] }} A:{{ '!' if messages[0]['content'] == 'tea' }}")
    assert render_text(template, [Message("user", "coffee")]) == "Q: coffee A:"
    with pytest.raises(UserError, match="changes its own text with message 1"):
        render_prompt(template, [Message("user", "tea")])


def test_one_message_must_not_change_another():
    source = (
        "{% set bold = messages | selectattr('content', 'equalto', 'loud') | list %}"
        "{% for m in messages %}"
        "{{ m['content'] | upper if bold and not m['content'] == 'loud' else m['content'] }}{% endfor %}"
    )
    assert render_text(chat(source), [Message("user", "quiet"), Message("user", "tea")]) == "quiettea"
    with pytest.raises(UserError, match="changes"):
        render_prompt(chat(source), [Message("user", "loud"), Message("user", "tea")])


def test_the_date_in_a_template_stands_still():
    source = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    assert render_text(chat(source), [Message("user", "x")]) == "26 Jul 2024 x"


def test_hugging_face_dialect(student):
    source = (
        "{% for m in messages %}\n"
        "    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m['content'] }}{% endgeneration %}\n"
        "{% endfor %}{{ {'a': '<é>'} | tojson }}"
    )
    theirs = student.hf.apply_chat_template([{"role": "user", "content": "x"}], chat_template=source, tokenize=False)
    assert render_text(chat(source), [Message("user", "x")]) == theirs == 'x{"a": "<é>"}'


def test_plain_prompts():
    plain = PromptTemplate("plain", "\n\n")
    assert render_prompt(plain, ASK) == [Piece("Tell me about tea.", False), Piece("\n\n", True)]
    assert render_text(plain, TALK) == (
        "System: Be kind 🙂.\n\nUser: Hi\n\nAssistant: Hello {{ you }}\n\n"
        "User: Tell me\nabout tea {% now %}\n\nAssistant:\n"
    )
    assert render_prompt(plain, ()) == []


def test_a_template_that_only_processors_read_is_the_models(student, tmp_path):
    """So some vision-language models have it: read as plain, every prompt would be another one."""
    with_template(student, None).hf.save_pretrained(tmp_path)
    assert load_template(load_tokenizer(tmp_path)).kind == "plain"
    for content, kind in (({}, "plain"), ({"chat_template": student.hf.chat_template}, "chat")):
        (tmp_path / "chat_template.json").write_text(json.dumps(content))
        assert load_template(load_tokenizer(tmp_path)).kind == kind
    assert load_template(load_tokenizer(tmp_path)).source == load_template(student).source
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": [1]}))
    with pytest.raises(UserError, match=r"chat_template\.json: chat_template must be text"):
        load_tokenizer(tmp_path)


def test_choices_of_template(student, tmp_path):
    assert load_template(student).kind == load_template(student, "chat").kind == "chat"
    assert load_template(student, "plain") == PromptTemplate("plain", "\n\n")
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}{{ eos_token }}")
    own = load_template(student, str(tmp_path / "mine.jinja"))
    assert render_text(own, ASK) == "Tell me about tea.<|im_end|>"
    bare = with_template(student, None)
    assert load_template(bare).kind == "plain"
    with pytest.raises(UserError, match="has no chat template"):
        load_template(bare, "chat")
    with pytest.raises(UserError, match="none of"):
        load_template(student, "chatty")
    (tmp_path / "bad.jinja").write_text("line\n{% if %}")
    with pytest.raises(UserError, match="not valid Jinja, line 2"):
        load_template(student, str(tmp_path / "bad.jinja"))


def test_what_a_template_is_told_is_checked_and_can_be_written_into_it(student):
    source = CHATML + "{% if thinks is defined and not thinks %}<no thoughts>{{ style }}{% endif %}"
    tokenizer = with_template(student, source)
    told = load_template(tokenizer, template_variables='{"thinks": false, "style": "it\'s"}')
    assert render_text(told, ASK).endswith("<no thoughts>it's")
    assert told.fingerprint != load_template(tokenizer).fingerprint
    assert render_text(chat(told_source(told)), ASK) == render_text(told, ASK)
    loud = PromptTemplate("chat", told_source(told), settings='{"thinks": true}')
    assert not render_text(loud, ASK).endswith("it's")
    assert told_source(load_template(tokenizer)) == source
    for wrong, message in (
        ('{"think": false}', "'think'.*it uses.*style, thinks"),
        ("[]", "JSON object"),
        ("{", "JSON"),
    ):
        with pytest.raises(UserError, match=message):
            load_template(tokenizer, template_variables=wrong)
    with pytest.raises(UserError, match="plain"):
        load_template(tokenizer, "plain", template_variables='{"thinks": false}')


@pytest.mark.parametrize("ending", ["", "(loop.last and add_generation_prompt) or "])
def test_an_answer_that_is_closed_only_before_another_turn_is_closed_all_the_same(student, ending):
    source = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if " + ending + "not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    )
    tokenizer = with_template(student, source)
    assert end_of_turn_id(tokenizer, load_template(tokenizer)) == student.hf.convert_tokens_to_ids("<|im_end|>")


def test_files_and_variables_that_cannot_be_read_are_named(student, tmp_path):
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_template(student, str(tmp_path / "latin.jinja"))
    (tmp_path / "deep.jinja").write_text("{{ " + "(" * 3000 + ")" * 3000 + " }}")
    with pytest.raises(UserError, match="not valid Jinja"):
        load_template(student, str(tmp_path / "deep.jinja"))
    for wrong in ('{"a": NaN}', "[" * 100_000):
        with pytest.raises(UserError, match="not valid JSON"):
            load_template(student, template_variables=wrong)


@pytest.mark.parametrize(
    "source", ["{{ " + "1" * 5000 + " }}", "{{ '" + "a" * (1 << 20) + "' }}"], ids=["digits", "long"]
)
def test_a_file_that_cannot_be_compiled_is_named(student, tmp_path, source):
    """Whatever Python makes of it: a number of thousands of digits is neither a syntax error nor too deep."""
    (tmp_path / "odd.jinja").write_text(source)
    with pytest.raises(UserError, match=r"odd\.jinja\" is not valid Jinja"):
        load_template(student, str(tmp_path / "odd.jinja"))


def test_a_template_that_refuses_or_is_stopped_is_named_by_its_file(student, tmp_path):
    for source, reason in (
        ("{{ raise_exception('no') }}", "refuses the messages"),
        ("{{ 'a' * 10**9 }}", "was stopped"),
    ):
        (tmp_path / "odd.jinja").write_text(source)
        with pytest.raises(UserError, match=rf'The chat template of "[^"]*odd\.jinja" {reason}'):
            render_prompt(load_template(student, str(tmp_path / "odd.jinja")), ASK)


def test_the_fingerprint_knows_every_part():
    templates = [
        PromptTemplate("plain", "\n"),
        PromptTemplate("plain", "\n\n"),
        PromptTemplate("chat", "\n"),
        chat("\n", bos_token="<s>"),
        chat("\n", bos_token="<t>"),
    ]
    assert len({template.fingerprint for template in templates}) == len(templates)
    same = PromptTemplate("chat", "\n", (("b", "1"), ("a", "2")))
    assert same.fingerprint == chat("\n", a="2", b="1").fingerprint
    assert len(same.fingerprint) == len(hashlib.sha256().hexdigest())


# ------------------------------------------------------------------------------------------------ ids


def test_special_tokens_typed_by_a_user_are_text(student, teacher):
    for tokenizer, literal in ((student, "<|im_end|>"), (teacher, "<end_of_turn>")):
        template = load_template(tokenizer)
        typed = prompt_ids(tokenizer, template, [Message("user", f"a {literal} b")])
        special = tokenizer.hf.convert_tokens_to_ids(literal)
        assert np.count_nonzero(typed == special) == 1  # the template's own
        assert literal in tokenizer.hf.decode(typed).replace(literal, "", 1)


def test_a_special_token_cannot_be_typed_in_halves(student):
    source = CHATML.replace("{{ m['content'] }}", "<|im{{ m['content'] }}")
    template = chat(source)
    ids = prompt_ids(student, template, [Message("user", "_end|>")])
    assert np.count_nonzero(ids == student.hf.convert_tokens_to_ids("<|im_end|>")) == 1


def test_typing_a_special_token_changes_nothing_else(student):
    template = load_template(student)
    clean = prompt_ids(student, template, [Message("user", "tea")]).tolist()
    typed = prompt_ids(student, template, [Message("user", "tea<|im_end|>")]).tolist()
    literal = encode(student, "<|im_end|>").tolist()
    place = next(i for i in range(len(typed)) if typed[i : i + len(literal)] == literal)
    assert typed[:place] + typed[place + len(literal) :] == clean


def test_bos_comes_once(teacher, student):
    bos = teacher.bos_id
    assert bos is not None and student.bos_id is None
    for template in (load_template(teacher), load_template(teacher, "plain")):
        ids = prompt_ids(teacher, template, ASK)
        assert ids[0] == bos and np.count_nonzero(ids == bos) == 1
    # A chat template writes its own: without one there is none, as in transformers.
    assert bos not in prompt_ids(teacher, chat("{{ messages[0]['content'] }}"), ASK)
    # ChatML's first token is the student's bos_token; no second one is put in front.
    start = student.hf.bos_token_id
    assert np.count_nonzero(prompt_ids(student, load_template(student), ASK)[:2] == start) == 1
    assert start not in prompt_ids(student, load_template(student, "plain"), ASK)


def test_ids_are_int32(student):
    assert prompt_ids(student, load_template(student), ASK).dtype == np.int32


def test_an_empty_prompt_needs_a_bos(teacher, student):
    plain = PromptTemplate("plain", "\n\n")
    assert prompt_ids(teacher, plain, ()).tolist() == [teacher.bos_id]
    with pytest.raises(UserError, match="nothing predicts the first token"):
        prompt_ids(student, plain, ())


def test_the_token_that_ends_a_turn(teacher, student):
    assert end_of_turn_id(teacher, load_template(teacher)) == teacher.hf.convert_tokens_to_ids("<end_of_turn>")
    assert end_of_turn_id(student, load_template(student)) == student.hf.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(teacher, load_template(teacher, "plain")) == teacher.hf.eos_token_id
    spaced = chat("{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}", eos_token="<eos>")
    assert end_of_turn_id(teacher, spaced) == teacher.hf.eos_token_id
    # A special token that only comes after more text does not end the turn.
    far = chat("{% for m in messages %}{{ m['content'] }} ### <start_of_turn>{% endfor %}")
    assert end_of_turn_id(teacher, far) == teacher.hf.eos_token_id


def test_without_any_end_of_turn_the_tokenizer_is_named(student):
    backend = Tokenizer.from_str(student.hf.backend_tokenizer.to_str())
    bare = load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="bare"))
    with pytest.raises(UserError, match='"bare" has a token for the end of a turn'):
        end_of_turn_id(bare, PromptTemplate("plain", "\n"))


# ------------------------------------------------------------------------------------------------ fitting


LONG = "🙂 steep it briefly; the crust cracks, voilà. " * 20


def long_pair(*messages):
    return PreferencePair("id", messages, "A", "B", source="x.jsonl:7")


def both(teacher, student):
    return [TextModel(tokenizer, load_template(tokenizer), end_of_turn=0) for tokenizer in (teacher, student)]


def test_a_prompt_that_fits_is_left_alone(teacher, student):
    models = both(teacher, student)
    first, second, *ends, cut = fit_prompt(long_pair(*TALK), *models, 500, 500)
    assert cut == 0
    assert first.tolist() == models[0].prompt(TALK).tolist()
    assert second.tolist() == models[1].prompt(TALK).tolist()
    assert ends == [render_text(model.template, TALK)[-64:] for model in models]


@pytest.mark.parametrize(("max_teacher", "max_student"), [(60, 1000), (1000, 60), (80, 80)])
def test_both_sides_lose_the_same_characters_and_no_more_than_needed(teacher, student, max_teacher, max_student):
    models = both(teacher, student)
    pair = long_pair(Message("system", "Be kind."), Message("user", LONG))
    first, second, *ends, cut = fit_prompt(pair, *models, max_teacher, max_student)
    assert len(first) <= max_teacher and len(second) <= max_student
    for dropped, expected in ((cut, True), (cut - 1, False)):
        messages = [pair.prompt[0], Message("user", LONG[dropped:])]
        ids = models[0].prompt(messages), models[1].prompt(messages)
        assert (len(ids[0]) <= max_teacher and len(ids[1]) <= max_student) == expected
        if expected:
            assert (first.tolist(), second.tolist()) == (ids[0].tolist(), ids[1].tolist())
            assert ends == [render_text(model.template, messages)[-64:] for model in models]


def test_only_the_last_user_message_is_cut(teacher, student):
    models = both(teacher, student)
    pair = long_pair(Message("user", "What is tea?"), Message("assistant", "A drink."), Message("user", LONG))
    _, ids, *_, cut = fit_prompt(pair, *models, 200, 90)
    text = student.hf.decode(ids)
    assert text.startswith("<|im_start|>user\nWhat is tea?<|im_end|>\n<|im_start|>assistant\nA drink.<|im_end|>\n")
    assert text.endswith(LONG[cut:] + "<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_longer_than_the_limit_is_an_error_with_its_place(teacher, student):
    with pytest.raises(PromptTooLong, match=r"x\.jsonl:7: .*without its last user message"):
        fit_prompt(long_pair(Message("user", LONG)), *both(teacher, student), 500, 5)
    with pytest.raises(PromptTooLong):
        fit_prompt(long_pair(Message("system", LONG), Message("user", "x")), *both(teacher, student), 50, 50)


def test_errors_of_a_template_name_the_pair(teacher, student):
    refusing = TextModel(student, chat("{{ raise_exception('only tea') }}"), end_of_turn=0)
    with pytest.raises(UserError, match=r"x\.jsonl:7: .*only tea"):
        fit_prompt(long_pair(*ASK), both(teacher, student)[0], refusing, 100, 100)


# ------------------------------------------------------------------------------------------------ real tokenizers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "mistral-v0.1", "deepseek", "smollm2", "gemma3"])
def test_real_prompts_are_those_of_transformers(real_tokenizers, name):
    tokenizer = load_tokenizer(str(real_tokenizers[name]))
    template = load_template(tokenizer)
    plain = prompt_ids(tokenizer, PromptTemplate("plain", "\n\n"), ASK).tolist()
    assert plain == tokenizer.hf(ASK[0].content + "\n\n")["input_ids"]
    assert 0 <= end_of_turn_id(tokenizer, template) < len(tokenizer.hf)
    if template.kind == "chat":
        turns = [{"role": message.role, "content": message.content} for message in TALK]
        theirs = tokenizer.hf.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert prompt_ids(tokenizer, template, TALK).tolist() == list(theirs)


@pytest.mark.slow
def test_smollm2_begins_once_and_ends_its_turn(real_tokenizers):
    """bos is <|im_start|>, eos and padding are <|im_end|>, and a system prompt of its own comes first."""
    tokenizer = load_tokenizer(str(real_tokenizers["smollm2"]))
    template = load_template(tokenizer)
    ids = prompt_ids(tokenizer, template, ASK)
    assert ids[0] == tokenizer.hf.convert_tokens_to_ids("<|im_start|>") and ids[1] != ids[0]
    assert end_of_turn_id(tokenizer, template) == tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    assert render_text(template, ASK).startswith("<|im_start|>system\n")


@pytest.mark.slow
def test_gemma3_base_is_asked_plainly(real_tokenizers):
    tokenizer = load_tokenizer(str(real_tokenizers["gemma3"]))
    template = load_template(tokenizer)
    assert template.kind == "plain"
    assert prompt_ids(tokenizer, template, ASK)[0] == tokenizer.hf.bos_token_id
    assert end_of_turn_id(tokenizer, template) == tokenizer.hf.eos_token_id
