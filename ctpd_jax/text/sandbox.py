"""Hugging Face's dialect of Jinja, in a sandbox with limits: a template comes with a model from anywhere.

Jinja's own sandbox keeps a template from Python's insides; it would let it compute for ever and fill the memory. Here
a rendering has a budget of characters and steps, and a time. Whatever makes something larger than what it is given is
charged before it is done, everything else when it is done, and every pass of a loop and every call is a step. So
nothing between two charges is much work, and with each the clock is looked at. That needs no signal and no process, and
holds in every thread; the clock is the thread's own, so that a busy machine refuses nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
import time
import types
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.visitor import NodeTransformer
from markupsafe import Markup


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Templates that print today's date would make another prompt of the same messages tomorrow; this is the date that
# Llama 3's own template falls back to.
TEMPLATE_DATE = datetime(2024, 7, 26)
# Of one rendering. The longest templates take some thousands of characters more than their messages, and a millisecond.
BUDGET = 1 << 24  # characters and steps
PASSES = 64  # and so often the characters of the messages
STEP = 32  # what a pass of a loop, a call, a filter costs
_PART = 8  # and a part of a list
SECONDS = 10.0
LONGEST_SOURCE = 1 << 20
_LARGEST_INT = 4096  # bits
_LARGEST_WIDTH = re.compile(r"\d{5}")  # in what says how to format
_WIDTH, _STAR = (re.compile(r"%(\(.*?\))?[-+ #.*0-9]*" + end, re.DOTALL) for end in (r"\d{5}", r"\*"))  # after a "%"
# Filters whose result is bounded by what they are given. The rest of Jinja's are for HTML, draw lots, or are slow.
_FILTERS = _words(
    "abs attr batch capitalize center count d default dictsort e escape first float forceescape format groupby indent "
    "int items last length list lower map max min reject rejectattr reverse round safe select selectattr slice sort "
    "string title trim truncate unique upper urlencode wordcount"
)
# Those that make more than they are given, by a number or by a text that they repeat; and such methods of texts.
_GROWING = _words("batch center indent round slice ljust rjust zfill expandtabs")
_FORBIDDEN = _words("encode to_bytes translate maketrans")  # of texts and numbers; no template needs them


class TooMuch(jinja2.TemplateError):
    """A template has used up what it may use."""


class _Meter(threading.local):
    """What the rendering of this thread may still use."""

    left: float = math.inf
    look: float = math.inf  # what is left when the clock is looked at again
    until: float = math.inf


_meter = _Meter()


@contextlib.contextmanager
def limited(characters: int) -> Iterator[None]:
    """Limit what templates do in this thread meanwhile; `characters` are those of the messages."""
    before = _meter.left, _meter.look, _meter.until
    _meter.left = _meter.look = BUDGET + PASSES * characters
    _meter.until = time.thread_time() + SECONDS
    try:
        yield
    finally:
        _meter.left, _meter.look, _meter.until = before


def _charge(number: float, only_asked: bool = False) -> None:
    """Take something off the budget, or only ask whether that could be done."""
    if number > _meter.left:
        _meter.left = -1  # for good, whoever catches this
        raise TooMuch(f"it makes more than {BUDGET:,} characters or steps for one prompt")
    if not only_asked:
        _meter.left -= number
    # The clock takes longer than a step does: it is looked at now and then.
    if _meter.left < _meter.look:
        _meter.look = _meter.left - 8 * STEP
        if time.thread_time() > _meter.until:
            _meter.left = -1
            raise TooMuch(f"it computes one prompt for more than {SECONDS:g} seconds")


# ------------------------------------------------------------------------------------------------ sizes


def _written(value: Any) -> tuple[int, int]:
    """Count the characters of a value that is written out, and what its parts cost: lists of one list are soon many."""
    characters, parts, todo = 0, 0, [value]
    # A list that holds another twice is counted as what it would be written as, and given up on before that is much.
    while todo:
        part = todo.pop()
        parts += _PART
        if isinstance(part, str):
            characters += len(part)
        elif isinstance(part, dict):
            todo += [*part, *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            todo += part
        if characters + parts > _meter.left:
            _charge(math.inf)
    return characters, parts


def _made(value: Any) -> Any:
    """Charge a value that was made; what is made piece by piece is charged piece by piece."""
    if isinstance(value, str):
        _charge(len(value))
    elif isinstance(value, dict | list | tuple | set | frozenset):
        _charge(_written(value)[1])  # it holds its texts, which are not made anew
    elif isinstance(value, int):
        _charge(math.inf if value.bit_length() > _LARGEST_INT else 0)
    elif isinstance(value, types.GeneratorType | map | filter | zip | reversed):
        return _counted(value)
    return value


def _counted(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        _charge(STEP)
        yield _made(value)


def _text(value: Any) -> str:
    """Return a value as the text that it is written as, which is charged."""
    # Before it is written: a few lists can be a very long text.
    if not isinstance(value, str):
        _charge(_written(value)[0], only_asked=True)
        value = str(value)
    _charge(1 + len(value))
    return value


def _product(*values: Any) -> None:
    """Refuse what would repeat something too often, whichever of the values says how often."""
    sizes = [abs(value) if isinstance(value, int) else sum(_written(value)) for value in values]
    _charge(math.prod(max(size, 1) for size in sizes), only_asked=True)


def _formatted(text: str, given: Any) -> None:
    """Refuse text % given where it would be too long, by its widths or by what it writes again and again."""
    values = given if isinstance(given, tuple) else tuple(given.values()) if isinstance(given, dict) else (given,)
    # A width stands in the text, or a star there takes it from the values; in a very long text either counts anywhere.
    starred = any(isinstance(value, int) and abs(value) > 9999 for value in values)
    short = len(text) < 10_000
    if (_WIDTH if short else _LARGEST_WIDTH).search(text) or (
        starred and (_STAR.search(text) if short else "*" in text)
    ):
        _charge(math.inf)
    _charge(len(text) + text.count("%") * (9999 + sum(_written(given))), only_asked=True)


class _Format(SandboxedFormatter):
    """str.format without fields that are wider than texts are."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if _LARGEST_WIDTH.search(format_spec):
            _charge(math.inf)
        return _text(super().format_field(value, format_spec))


class _EscapeFormat(_Format, SandboxedEscapeFormatter):
    pass


# ------------------------------------------------------------------------------------------------ filters


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    place = int(hasattr(function, "jinja_pass_arg"))  # of the value; the environment or so may come before it

    @wraps(function)  # and what it says of its first argument
    def called(*args: Any, **kwargs: Any) -> Any:
        _charge(STEP + len(args))
        # A number is a value of some digits, or else says how often.
        if name in _GROWING:
            value = args[place] if len(args) > place else ""
            _product(str(value) if isinstance(value, int) else value, *args[place + 1 :], *kwargs.values())
        return _made(function(*args, **kwargs))

    return called


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    _formatted(text := _text(value), kwargs or args)
    return jinja2.filters.do_format(text, *args, **kwargs)


@jinja2.pass_eval_context
def _replace(context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    s, old, new = map(_text, (s, old, new))
    _charge(len(s) + s.count(old) * len(new), only_asked=True)
    return jinja2.filters.do_replace(context, s, old, new, count)


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    # What is joined may be far more than the list that it is taken from.
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(context.environment, attribute), value)
    texts = list(map(_text, value))
    _charge(len(texts) * len(str(d)))
    return jinja2.filters.do_join(context, texts, d)


@jinja2.pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise TypeError("sum adds numbers")  # of lists it would copy the first again and again
    return jinja2.filters.sync_do_sum(environment, iterable, attribute, start)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own would escape "<" as HTML does.
    # It is written piece by piece, and each piece is charged.
    _written(value)
    if isinstance(indent, int) and indent > 1000:
        _charge(math.inf)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(map(_text, encoder.iterencode(value)))


# ------------------------------------------------------------------------------------------------ what is compiled


@jinja2.pass_context  # what asks for the context is not computed when the template is compiled
def _step(context: Any, characters: int) -> bool:
    _charge(STEP + max(int(characters), 0))
    return True


@jinja2.pass_context
def _output(context: Any, value: Any) -> str:
    return _text(value)


@jinja2.pass_context
def _value(context: Any, value: Any) -> Any:
    return _made(value)


# By names that no template can call them by, except as texts, which does no harm.
_CHARGES = {"step!": _step, "output!": _output, "value!": _value}


class _Charges(NodeTransformer):
    """Write the charges into a template: what Jinja compiles to Python's own loops, joins and lists."""

    def _filtered(self, node: Any, name: str) -> Any:
        return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def _with_step(self, node: Any) -> Any:
        self.generic_visit(node)
        # Its own text comes with every pass.
        own = sum(len(part.data) for part in node.find_all(jinja2.nodes.TemplateData))
        step = self._filtered(jinja2.nodes.Const(own, lineno=node.lineno), "step!")
        node.body.insert(0, jinja2.nodes.ExprStmt(step, lineno=node.lineno))
        if getattr(node, "test", None) is not None:
            step = self._filtered(jinja2.nodes.Const(0, lineno=node.lineno), "step!")
            node.test = jinja2.nodes.And(step, node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _with_step

    def _outputs(self, node: Any) -> Any:
        self.generic_visit(node)
        data = jinja2.nodes.TemplateData
        node.nodes = [part if isinstance(part, data) else self._filtered(part, "output!") for part in node.nodes]
        return node

    visit_Output = visit_Concat = _outputs

    def _values(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._filtered(node, "value!")

    visit_List = visit_Dict = _values

    def visit_Tuple(self, node: Any) -> Any:
        return self._values(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: Any) -> Any:
        return self._values(node) if isinstance(node.arg, jinja2.nodes.Slice) else self.generic_visit(node)


class _Namespace(jinja2.utils.Namespace):
    def __repr__(self) -> str:
        return "<Namespace>"  # its texts would be charged when they are written


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what an assistant says; here it is the text inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(inside).set_lineno(line)  # what is set inside is not set outside


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Compile and run chat templates; what they may use is decided by `limited` around it."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag])
        # Filters by what bounds their results, and globals without those that draw lots.
        own = {"format": _format, "replace": _replace, "join": _join, "sum": _sum, "tojson": _tojson}
        known = {name: function for name, function in self.filters.items() if name in _FILTERS} | own
        self.filters = {name: _metered(name, function) for name, function in known.items()} | _CHARGES
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": TEMPLATE_DATE.strftime}
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # draws lots

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any) -> str:
        charged = _Charges().visit(source).set_environment(self)
        return super()._generate(charged, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        forbidden = isinstance(obj, str | int | type) and attr in _FORBIDDEN
        return not forbidden and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # Before it is done: how large the result can be.
        _charge(STEP)
        if isinstance(left, str) and operator == "%":
            _formatted(left, right)
        elif operator == "*":
            numbers = isinstance(left, int) and isinstance(right, int)
            sizes = [
                v if isinstance(v, int) else len(v) for v in (left, right) if isinstance(v, int | str | list | tuple)
            ]
            _charge(0 if numbers or len(sizes) < 2 else max(sizes[0] * sizes[1], 0), only_asked=True)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _charge(math.inf if left.bit_length() * abs(right) > 2 * _LARGEST_INT else 0, only_asked=True)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _charge(len(left) + len(right), only_asked=True)
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _charge(STEP + len(args) + len(kwargs))
        # The methods of texts that make longer ones.
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and args:
            if name == "join":
                args = (list(map(_text, args[0])), *args[1:])
                _charge(len(args[0]) * len(owner))
            elif name == "replace" and len(args) > 1:
                _charge(len(owner) + owner.count(args[0]) * len(args[1]), only_asked=True)
            elif name in _GROWING:
                _product(owner, *args, *kwargs.values())
        return _made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return str.format and str.format_map with Jinja's limits on attributes, and those of widths and lengths."""
        if super().wrap_str_format(value) is None:
            return None
        # By a formatter that looks at each field.
        text = value.__self__
        markup = isinstance(text, Markup)
        formatter = _EscapeFormat(self, escape=text.escape) if markup else _Format(self)
        if value.__name__ == "format_map":
            return lambda fields: type(text)(formatter.vformat(text, (), fields))
        return lambda *args, **kwargs: type(text)(formatter.vformat(text, args, kwargs))


def compiled(source: str) -> jinja2.Template:
    """Compile a chat template. Raises what Jinja and Python raise where it is none, of several kinds."""
    if len(source) > LONGEST_SOURCE:
        raise TooMuch(f"it is longer than {LONGEST_SOURCE:,} characters")
    with limited(0):
        return ChatEnvironment().from_string(source)
