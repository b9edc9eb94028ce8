"""Random chat templates, and hostile ones: each renders as transformers renders it, or is told in a sentence."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from helpers.chat_collection import CASES
from transformers.utils.chat_template_utils import _compile_jinja_template

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message
from ctpd_jax.text import sandbox
from ctpd_jax.text.templates import PromptTemplate, render_chat, render_prompt
from fuzz import Found, peak_megabytes, smallest, texts

NAME = "a/model"
VARIABLES = (("bos_token", "<s>"), ("eos_token", "</s>"))
# Of what a hostile one takes: the limits of the sandbox, and what lies between two looks at the clock.
MOST_SECONDS = sandbox.SECONDS + 5
MOST_MEGABYTES = 1500
WORDS = (
    "<|im_start|>",
    "<|im_end|>\n",
    "[INST] ",
    " [/INST]",
    "<s>",
    "</s>",
    "\n",
    " ",
    "user: ",
    "\u00e9",
    "\x00",
    "}",
)
NUMBERS = ("0", "1", "-1", "3", "10**9", "99999", "10**20", "2**64", "0.5", "1e308", "true", "none")
NAMES = ("messages", "m", "m.content", "m['role']", "loop", "loop.index0", "ns.x", "ns", "bos_token", "eos_token")
NAMES += ("add_generation_prompt", "nothing", "tools", "messages[0]['content']", "messages[-1].role", "f", "namespace")
HIDDEN = (
    "__class__",
    "__init__",
    "__globals__",
    "__mro__",
    "__subclasses__()",
    "gi_frame",
    "f_back",
    "__self__",
    "mro()",
)
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is")
METHODS = (
    *("strip()", "split()", "split('\\n')", "upper()", "startswith('a')", "replace('a', 'aa')", "join(messages)"),
    *("center(10**9)", "zfill(99)", "format(m)", "items()", "get('role')", "encode()", "title()", "expandtabs(10**8)"),
    *("rstrip()", "find('a')", "copy()", "keys()", "append(1)", "pop()", "count('a')", "splitlines()", "index(1)"),
)
FILTERS = (
    *("trim", "upper", "length", "list", "string", "tojson", "tojson(indent=2)", "first", "last", "join", "join(', ')"),
    *(
        "replace('a', 'bb')",
        "map('upper')",
        "map(attribute='content')",
        "selectattr('role', 'equalto', 'user')",
        "sort",
    ),
    *(
        "default('x')",
        "int",
        "float",
        "round(2)",
        "reverse",
        "unique",
        "batch(2)",
        "slice(3)",
        "sum",
        "center(20)",
        "abs",
    ),
    *("indent(4)", "truncate(9)", "safe", "escape", "urlencode", "wordcount", "dictsort", "items", "groupby('role')"),
    *("capitalize", "title", "format(1)", "attr('__class__')", "rejectattr('role', 'in', ['system'])", "min", "max"),
    *("center(10**8)", "batch(10**8, 'x')", "wordwrap(3)", "pprint", "random", "striptags", "nothing", "count"),
)
GROWING = (
    "ns.x + ns.x",
    "ns.x ~ ns.x",
    "[ns.x, ns.x]",
    "ns.x * 99",
    "ns.x | replace('a', 'aaa')",
    "(ns.x, ns.x)",
    "[ns.x]",
)
GROWING += (
    "'%s%s' % (ns.x, ns.x)",
    "'{0}{0}'.format(ns.x)",
    "ns.x | string | escape",
    "{'a': ns.x, 'b': ns.x}",
    "ns.x[1:]",
)

# Written by hand: each would fill the memory or the day.
HOSTILE = (
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * [0] }}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    *(
        "{% set ns = namespace(x='aa') %}{% for i in range(999) %}{% set ns.x = " + one + " %}{% endfor %}{{ ns.x }}"
        for one in GROWING
    ),
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% set x = 'a' * 9**7 ~ 'b' %}{% for i in range(99999) %}{% if 'ab' in x %}{% endif %}{% endfor %}",
    "{% set x = range(99999) | list %}{{ x | select('in', x) | list | length }}",
    "{% set x = 'a' * 9**7 %}{{ [x, x, x, x, x, x] | join(x) }}",
    "{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "{% for a in range(3) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    *("{{ 'a'." + one + "(10**9) }}" for one in ("center", "ljust", "rjust", "zfill")),
    *("{{ '\ta' | string | " + one + "(10**9) }}" for one in ("center", "indent", "batch", "slice")),
    *("{{ 'a'" + one + " }}" for one in ("|round(10**9)", "|tojson(indent=10**9)", ".expandtabs(10**9)", ".encode()")),
    *("{{ '%" + one + "d' % (10**9, 1) }}" for one in ("1000000000", "*", ".1000000000")),
    *("{{ '{:" + one + "}'.format(1, 10**9) }}" for one in ("1000000000", "{}")),
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ ('ab' * 999).translate({97: 'b' * 99999}) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ ([[1]] * 99999) | sum(start=[]) }}",
    *("{{ ''." + one + " }}" for one in ("__class__.__mro__[1].__subclasses__()", "join.__self__.__class__")),
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__['json'].loads('1') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}{{ ''|attr('format')|attr('__self__')|attr('x') }}{{ f.x }}",
    "{{ (messages|map('upper')).gi_frame.f_back.f_globals.x }}",
    "{{ " + "(" * 2000 + ")" * 2000 + " }}",
    "{{ " + "1" * 5000 + " }}",
    "{% if 1 %}" * 120 + "{% endif %}" * 120,
    "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "\ud800{{ messages }}",
    "{{ '" + "a" * sandbox.LONGEST_SOURCE + "' }}",
)


def expression(rng: random.Random, depth: int = 3) -> str:
    """Any expression."""

    def inner() -> str:
        return expression(rng, depth - 1)

    kind = rng.randrange(12) if depth else rng.randrange(3)
    if kind < 2:
        return rng.choice(NAMES)
    if kind == 2:
        return rng.choice(NUMBERS) if rng.random() < 0.5 else repr(rng.choice(WORDS))
    if kind < 5:
        return f"({inner()} {rng.choice(OPERATORS)} {inner()})"
    if kind < 8:
        return f"({inner()} | {rng.choice(FILTERS)})"
    if kind == 8:
        return f"{inner()}.{rng.choice(METHODS)}"
    if kind == 9:
        return rng.choice(("[{}, {}]", "({}, {})", "{{'a': {}, 'b': {}}}", "{}[{}:]", "{}({})", "{}[{}]")).format(
            inner(), inner()
        )
    if kind == 10:
        return f"({inner()} if {inner()} else {inner()})"
    return f"{inner()}.{rng.choice(HIDDEN)}" if rng.random() < 0.3 else f"range({inner()})"


def statements(rng: random.Random, depth: int = 3) -> str:
    """Any text of a template."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(11) if depth else rng.randrange(3)
        inside = statements(rng, depth - 1) if depth else ""
        if kind == 0:
            parts.append(rng.choice(WORDS))
        elif kind < 3:
            parts.append("{{ " + expression(rng) + " }}")
        elif kind < 5:
            condition = f" if {expression(rng, 1)}" if rng.random() < 0.3 else ""
            over = rng.choice(("messages", "messages", "messages[1:]", "range(9)", "range(99999)", expression(rng, 1)))
            parts.append("{% for m in " + over + condition + " %}" + inside + "{% endfor %}")
        elif kind < 7:
            parts.append(
                "{% if " + expression(rng, 2) + " %}" + inside + "{% else %}" + rng.choice(WORDS) + "{% endif %}"
            )
        elif kind == 7:
            parts.append("{% set ns.x = " + rng.choice((expression(rng, 2), *GROWING)) + " %}")
        elif kind == 8:
            parts.append(
                rng.choice(("{% set q = {} %}", "{% generation %}{}{% endgeneration %}")).replace(
                    "{}", rng.choice(("m", "1"))
                )
            )
        elif kind == 9:
            parts.append("{% macro f(a, b=1) %}" + inside + "{% endmacro %}{{ f(" + expression(rng, 1) + ") }}")
        else:
            parts.append(
                rng.choice(
                    ("{{ raise_exception('no') }}", "{% break %}", "{# c #}", "{% filter upper %}a{% endfilter %}")
                )
            )
    return "".join(parts)


def ordinary(rng: random.Random) -> str:
    """A template as models have them: markers around messages, a system prompt or none."""
    opening, closing = rng.choice(WORDS), rng.choice(WORDS)
    content = rng.choice(
        ("m['content']", "m.content", "m['content'] | trim", "m['content'].strip()", "m.content | upper")
    )
    system = rng.choice(
        ("", "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}", "be kind")
    )
    system += rng.choice(
        ("", "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
    )
    loop = rng.choice(
        ("messages", "messages[1:]", "messages | selectattr('role', 'in', ['user', 'assistant'])", "loop_messages")
    )
    ask = rng.choice(("", "{% if add_generation_prompt %}" + opening + "assistant\n{% endif %}"))
    return (
        rng.choice(("", "{{ bos_token }}"))
        + f"{system}{{% for m in {loop} %}}{opening}{{{{ m['role'] }}}}{{{{ {content} }}}}{closing}{{% endfor %}}{ask}"
    )


# ------------------------------------------------------------------------------------------------ what must hold


# transformers' Jinja computes constants when it compiles, in branches too that nobody takes: powers and large numbers
# are not given to it, and what is left has a time.
FOLDED = re.compile(r"\*\*|\d{6}")
SECONDS_OF_REFERENCE = 20.0


class _TooLong(BaseException):
    """Raised by a signal; no template catches it."""


def _too_long(*_: Any) -> None:
    raise _TooLong


def reference(source: str, messages: Sequence[Message], ask: bool) -> str | Exception | None:
    """The same by transformers, which has no limits: text or error, None where that would take too much."""
    if FOLDED.search(source):
        return None
    turns = [{"role": message.role, "content": message.content} for message in messages]
    told = {"tools": None, "documents": None, "strftime_now": sandbox.TEMPLATE_DATE.strftime, **dict(VARIABLES)}
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_OF_REFERENCE)
    try:
        return _compile_jinja_template(source).render(messages=turns, add_generation_prompt=ask, **told)
    except (_TooLong, MemoryError):
        return None
    except Exception as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What differs on purpose, or with every process; and a part of a constant that has none, which Jinja computes when it
# compiles, where it is nothing instead of an error.
OURS = ("was stopped", "No filter named", "is unsafe", "sum adds numbers", "lipsum", "'random'", "is not subscriptable")
DIFFERS = (" at 0x", "namespace", "<class", "<function", "<bound", "<built-in")  # also where a filter has rewritten it


def check(source: str, messages: Sequence[Message], ask: bool) -> str:
    """Render a template; returns how that ended. Raises where an invariant is broken."""
    template = PromptTemplate("chat", source, VARIABLES, name=NAME)
    began = time.thread_time()
    said, text = "", ""
    try:
        text = render_chat(template, messages, ask)
    except UserError as error:
        said = str(error)
        assert said.startswith(f'The chat template of "{NAME}"') and len(said.split()) > 6, said
    assert time.thread_time() - began < MOST_SECONDS, "it took too long"
    if said and any(word in said for word in OURS):
        return "stopped" if "was stopped" in said else "refused"
    theirs = None if any(0xD800 <= ord(letter) < 0xE000 for letter in source) else reference(source, messages, ask)
    if theirs is not None:
        if said:
            assert isinstance(theirs, Exception), f"refused ({said}), and transformers renders it"
            return "refused"
        assert not isinstance(theirs, Exception), f"rendered, and transformers says {theirs!r}"
        assert text == theirs or any(word in text.lower() for word in DIFFERS), "another text than transformers'"
    # The pieces are the whole text again, and rendering is the same twice.
    try:
        pieces = render_prompt(template, messages)
    except UserError:
        return "refused" if said else "no pieces"
    assert (
        "".join(piece.text for piece in pieces) == render_chat(template, messages) or messages[-1].role == "assistant"
    )
    assert render_prompt(template, messages) == pieces
    return "rendered"


def talk(rng: random.Random) -> list[Message]:
    roles = ["system"] * (rng.random() < 0.4) + ["user", "assistant", "user"][: rng.choice((1, 1, 2, 3))]
    return [Message(role, texts.text(rng, WORDS)) for role in roles]


def run_hostile(seed: str, found: Found) -> None:
    """The hostile ones, with the limits as they are."""
    before = peak_megabytes()
    for source in HOSTILE:
        with found.told(template=source[:200], seed=seed):
            found.counts[f"templates {check(source, [Message('user', 'hi')], True)}"] += 1
        found.counts["renderings"] += 1
    took = peak_megabytes() - before
    with found.told(seed=seed):
        assert took < MOST_MEGABYTES, f"hostile templates took {took} MB"


def run_batch(rng: random.Random, seed: str, found: Found) -> None:
    """Some random templates, with lower limits: what is stopped is stopped sooner."""
    before = sandbox.BUDGET, sandbox.SECONDS
    sandbox.BUDGET, sandbox.SECONDS = 1 << 17, 2.0
    try:
        for _ in range(50):
            source = rng.choice((statements, statements, ordinary))(rng)
            if rng.random() < 0.1:  # one of a real model, damaged
                source = rng.choice(CASES).source
                place = rng.randrange(len(source))
                source = (
                    source[:place]
                    + rng.choice(("", "{{", "%}", "}", expression(rng, 1)))
                    + source[place + rng.randrange(9) :]
                )
            messages, ask = talk(rng), rng.random() < 0.7
            failed = len(found.failures)
            with found.told(template=source, messages=messages, ask=ask, seed=seed):
                found.counts[f"templates {check(source, messages, ask)}"] += 1
            if failed < len(found.failures) and failed < 5:
                found.failures[-1] += f"\n    minimal template={smallest(source, partial(_fails, messages, ask))!a}"
            found.counts["renderings"] += 1
    finally:
        sandbox.BUDGET, sandbox.SECONDS = before


def _fails(messages: Sequence[Message], ask: bool, source: str) -> bool:
    try:
        check(source, messages, ask)
    except Exception:
        return True
    return False
