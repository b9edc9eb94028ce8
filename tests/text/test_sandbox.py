"""Chat templates cannot compute for ever, fill the memory or leave the sandbox: they are stopped, and told by name."""

from __future__ import annotations

import threading
import time

import pytest
from fuzz.templates import HOSTILE

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message
from ctpd_jax.text import sandbox
from ctpd_jax.text.templates import PromptTemplate, render_chat, render_prompt

ASK = [Message("user", "Tell me about tea.")]


def said(source: str, messages=ASK) -> str:
    with pytest.raises(UserError) as raised:
        render_chat(PromptTemplate("chat", source, name="models/odd"), messages)
    return str(raised.value)


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: ascii(source[:60]))
def test_hostile_templates_are_stopped_soon_and_told_by_name(source, monkeypatch):
    monkeypatch.setattr(sandbox, "BUDGET", 1 << 18)
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    began = time.thread_time()
    try:
        assert len(render_chat(PromptTemplate("chat", source, name="models/odd"), ASK)) < 100_000
    except UserError as error:
        assert str(error).startswith('The chat template of "models/odd"')
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 'a' * 10**9 }}", "more than 16,777,216 characters or steps"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 16,777,216"),
        (
            "{% set x = 'a' * 9**7 ~ 'b' %}{% for i in range(99999) %}{{ 'ab' in x }}{% endfor %}",
            "more than 0.1 seconds",
        ),
        ("{{ '" + "a" * sandbox.LONGEST_SOURCE + "' }}", "longer than 1,048,576 characters"),
    ],
    ids=["memory", "steps", "time", "length"],
)
def test_the_limit_is_told(source, reason, monkeypatch):
    if "seconds" in reason:
        monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    assert reason in said(source) and "was stopped" in said(source)


def test_limits_hold_in_threads_at_the_same_time():
    found: dict[int, str] = {}

    def work(number: int) -> None:
        if number % 2:
            found[number] = said("{% for a in range(99999) %}{{ a }}{{ 'x' * 999 }}{% endfor %}")
        else:
            found[number] = render_chat(PromptTemplate("chat", "{{ messages[0].content }}"), ASK)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[2] == ASK[0].content and "was stopped" in found[1] and "was stopped" in found[3]


def test_a_limit_that_a_template_hits_does_not_stay():
    said("{{ 'a' * 10**9 }}")
    assert render_chat(PromptTemplate("chat", "{{ messages[0].content * 3 }}"), ASK) == ASK[0].content * 3


def test_the_budget_grows_with_the_messages():
    """A long conversation, trimmed, replaced in, joined and written as JSON, is ordinary work."""
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text + m.content | trim %}"
        "{% if m.content.startswith('x') %}{{ messages[loop.index0:] | map(attribute='role') | join(',') }}{% endif %}"
        "{% endfor %}{{ ns.text | replace('tea', 'coffee') }}{{ messages | tojson(indent=2) }}{{ ns.text | indent(4) }}"
    )
    talk = [Message("user", "tea \n" * 2000) for _ in range(60)]
    assert len(render_chat(PromptTemplate("chat", source), talk)) > 2_000_000
    one = [Message("user", "\U0001f375 " * 3_000_000)]
    assert len(render_prompt(PromptTemplate("chat", "Q: {{ messages[0]['content'] | trim }}"), one)) == 2


def test_what_templates_ask_for_in_earnest_goes_on():
    source = (
        "{{ '%s: %05.2f|%-8s|' % ('a', 1.5, 'b') }}{{ '{0:>8}|{1!r}|{x:03d}'.format('c', 'd', x=7) }}"
        "{{ '%s **%s**' | format('e', 20240101) }}{{ ['f', 'g'] | join(', ') }}{{ 12345678901 | round(1) }}"
        "{{ 'h' | center(7) }}{{ [1, 2, 3] | batch(2, '-') | list }}{{ 'i j'.split() | map('upper') | list }}"
        "{{ [{'k': 1}, {'k': 2}] | sum(attribute='k') }}{{ 'l' ~ 1 ~ none }}{{ 'abc'[::-1] }}{{ dict(m=1) }}"
        "{{ ('n' if messages else 'o') * 3 }}{{ 2 ** 10 }}{{ 7 // 2 }}{{ 'p'.zfill(4) }}{{ 'q\tr'.expandtabs(4) }}"
    )
    assert render_chat(PromptTemplate("chat", source), ASK) == (
        "a: 01.50|b       |       c|'d'|007e **20240101**f, g12345678901   h   [[1, 2], [3, '-']]['I', 'J']"
        "3l1Nonecba{'m': 1}nnn10243000pq   r"
    )
