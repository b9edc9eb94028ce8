"""What a run shows in a terminal: one aligned pair span by span, and the table at the end.

Text from data is shown with its white space and its invisible characters visible, so that a token's border can be seen
and nothing in a data set can steer the terminal.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctpd_jax.schema import SIDES, Counters, TokenSide
from ctpd_jax.text.read_row import HARMLESS
from ctpd_jax.text.tokenizer_json import CONTROL
from ctpd_jax.text.tokens import TextTokenizer

WIDTH = 110  # columns of the example and of the table
MAX_SPANS = 40  # of one response
MAX_PROMPT = 400  # characters of one message
NONE = "n/a"
BORDER = " ¦ "  # between two tokens of a span

# The senses of "prefers the chosen response"; evaluate/preferences.py defines them.
SENSES = {"per_byte": "per byte", "vs_start": "vs start", "vs_teacher": "vs teacher"}
SUBSETS = {"all": "all", "length_matched": "length-matched"}

_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
# Written out as <U+200B>: controls, format characters (zero-width, direction), line separators, no characters at all.
_WRITTEN_OUT = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


# ------------------------------------------------------------------------------------------------ text of tokens


def pieces(tokenizer: TextTokenizer, side: TokenSide, span: int) -> list[str]:
    """The text of each token of one span, in order.

    It is the tokens' own text, from the vocabulary: a dummy space in front is there, and bytes that are no whole
    character read <0xF0>. A special token reads as its name.
    """
    return [token_text(tokenizer, token) for token in side.ids[np.flatnonzero(side.span_ids == span)].tolist()]


def token_text(tokenizer: TextTokenizer, token: int) -> str:
    """What one token says; see `pieces`."""
    lengths = tokenizer.vocabulary.lengths
    if token >= len(lengths) or lengths[token] == CONTROL:
        return tokenizer.backend.id_to_token(token) or f"<id {token}>"
    return decode(tokenizer.token_bytes(token))


def decode(data: bytes) -> str:
    """UTF-8 as text; every byte that belongs to no whole character as <0xF0>."""
    text = ""
    while data:
        try:
            return text + data.decode("utf-8")
        except UnicodeDecodeError as error:
            broken = "".join(f"<0x{byte:02X}>" for byte in data[error.start : error.end])
            text += data[: error.start].decode("utf-8") + broken
            data = data[error.end :]
    return text


def visible(text: str) -> str:
    """The text with white space, invisible and control characters made visible."""
    shown = []
    for character in text:
        if character in _VISIBLE:
            shown.append(_VISIBLE[character])
        elif unicodedata.category(character) in _WRITTEN_OUT or character.isspace():
            shown.append(f"<U+{ord(character):04X}>")
        else:
            shown.append(character)
    if text and unicodedata.category(text[0]).startswith("M"):
        shown.insert(0, "◌")  # a mark needs something to stand on
    return "".join(shown)


def harmless(text: str) -> str:
    """Text to be read, not examined: only what could steer a terminal or a page is made visible."""
    return "".join(
        f"<U+{ord(c):04X}>" if c not in "\n\t" and (unicodedata.category(c) in {"Cc", "Cs"} or c in _DIRECTION) else c
        for c in text
    )


_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# ------------------------------------------------------------------------------------------------ data


def counts(counters: Counters) -> str:
    """What was read, cut and escaped; then the table of reasons, and the columns that were left alone."""
    reasons = counters.left_out
    told = {name: count for name, count in counters.counts.items() if count and name not in ("rows", "kept", *reasons)}
    parts = ["; ".join(f"{name} {count:,}" for name, count in told.items()), counters.reasons()]
    if columns := counters.notes.get(HARMLESS):
        parts.append(f"harmless columns: {', '.join(columns)}")
    return harmless("\n  ".join(part for part in parts if part))


def overlap_line(shares: Mapping[str, float]) -> str:
    """How much of the test data is in the training data."""
    pairs, prompts = percent(shares["pairs"]), percent(shares["prompts"])
    return f"Of the test data, {pairs} of the pairs and {prompts} of the prompts are in the training data too."


# ------------------------------------------------------------------------------------------------ one pair


def example_text(example: Mapping[str, Any]) -> str:
    """An aligned pair as assess.example gives it: both responses span by span, for both tokenizers."""
    parts = [f"Pair {harmless(str(example['id']))}  {harmless(str(example.get('source') or ''))}".rstrip()]
    for message in example.get("prompt") or ():
        content = harmless(message["content"])
        if len(content) > MAX_PROMPT:
            content = f"{content[:MAX_PROMPT]} ... and {len(content) - MAX_PROMPT} characters more"
        parts.append(f"{message['role']}: {content}")
    for name in SIDES:
        if name in example:
            parts.append(_side_text(name, example[name]))
    return "\n".join(parts)


def _side_text(name: str, side: Mapping[str, Any]) -> str:
    spans: Sequence[Mapping[str, Any]] = side["spans"]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=side_title(name, side),
        title_justify="left",
        title_style="",
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("span", justify="right")
    for column in ("text", "teacher tokens", "student tokens"):
        table.add_column(column, overflow="fold")
    table.add_column("m:n", justify="right")
    table.add_column("weight", justify="right")
    for number, span in enumerate(spans[:MAX_SPANS]):
        table.add_row(
            str(number),
            Text(span_text(span)),
            Text(BORDER.join(visible(piece) for piece in span["teacher"])),
            Text(BORDER.join(visible(piece) for piece in span["student"])),
            proportion(span),
            figure(span.get("weight"), 2),
        )
    more = len(spans) - MAX_SPANS
    return render(table) + (f"\n  ... and {more} more spans" if more > 0 else "")


def side_title(name: str, side: Mapping[str, Any]) -> str:
    """ "chosen: 12 spans, 14 teacher tokens, 17 student tokens, cut"."""
    spans = side["spans"]
    counts = [sum(len(span[model]) for span in spans) for model in ("teacher", "student")]
    cut = ", cut to the length limit" if side.get("truncated") else ""
    return f"{name}: {len(spans)} spans, {counts[0]} teacher tokens, {counts[1]} student tokens{cut}"


def span_text(span: Mapping[str, Any]) -> str:
    """A span's text, made visible; the end-of-turn span covers no text."""
    return visible(span["text"]) or "(end of turn)"


def proportion(span: Mapping[str, Any]) -> str:
    return f"{len(span['teacher'])}:{len(span['student'])}"


# ------------------------------------------------------------------------------------------------ the end table


def table(evaluation: Mapping[str, Any]) -> str:
    """What `evaluate` found, as assess.evaluate writes it: accuracies, then the other figures, then the baseline."""
    models: Mapping[str, Mapping[str, Any]] = evaluation["models"]
    title = f"How often the chosen response is preferred, % [95 % interval], {evaluation.get('pairs', NONE)} pairs"
    accuracies = _table(title, "model", "pairs", *SENSES.values())
    for name, row in models.items():
        for place, (subset, label) in enumerate(SUBSETS.items()):
            found = row.get(subset) or {}
            cells = [share(found.get(sense)) for sense in SENSES]
            accuracies.add_row(harmless(name) if place == 0 else "", label, *cells)

    rewarded = any(row.get("true_reward") for row in models.values())
    names = ["model", "margin vs start", "λ mean", "λ < 0.05", "λ > 0.95", "bits per byte"]
    others = _table("Other figures", *names, *(["true reward"] if rewarded else []))
    for name, row in models.items():
        lam = row.get("lambda") or {}
        cells = [
            figure(row.get("margin_vs_start"), 3),
            figure(lam.get("mean"), 3),
            percent(lam.get("below_0.05")),
            percent(lam.get("above_0.95")),
            figure(row.get("bits_per_byte"), 3),
        ]
        others.add_row(harmless(name), *cells, *([mean_error(row.get("true_reward"))] if rewarded else []))

    parts = [render(accuracies), render(others), *baseline_lines(evaluation), *data_lines(evaluation.get("data"))]
    if evaluation.get("pieces"):
        parts.append("Weights and the decisive pieces of the toy world:")
        parts += [f"  {name}: {figure(value, 3)}" for name, value in flat(evaluation["pieces"])]
    return "\n".join(parts)


def baseline_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """The length-only baseline, a line for each subset, with the number of pairs."""
    longer = evaluation.get("longer_is_better") or {}
    lines = ["Baseline, the longer response is the chosen one:"]
    for subset, label in SUBSETS.items():
        found = longer.get(subset)
        lines.append(f"  {label + ' pairs':21} {share(found)}   n = {found['count'] if found else 0}")
    return lines


def data_lines(data: Mapping[str, Any] | None) -> list[str]:
    """What of the held-out pairs bears on their accuracies: overlap with the training data, and cut responses."""
    if not data:
        return []
    cut = (
        f"The length limit cuts one response of {data['one_side_cut']} pairs ({data['end_of_turn']}) and both of "
        f"{data['both_cut']}."
    )
    return [overlap_line(data["in_train"]), cut]


def share(found: Mapping[str, Any] | None) -> str:
    """An accuracy as "62.5 [55.1, 69.3]", in per cent."""
    if not found:
        return NONE
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def mean_error(found: Mapping[str, Any] | None) -> str:
    """ "1.25 ± 0.11"; an error that does not exist (one sample) is left out."""
    if not found or found.get("mean") is None:
        return NONE
    error = found.get("error")
    return figure(found["mean"], 2, sign=True) + ("" if error is None else f" ± {error:.2f}")


def figure(value: Any, digits: int, sign: bool = False) -> str:
    """A number with so many decimals, or with so many significant digits where those would hide it."""
    if value is None:
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return harmless(str(value))
    plus = "+" if sign else ""
    if isinstance(value, int):
        return f"{value:{plus}d}"
    if value and not 0.1**digits <= abs(value) < 1e6:
        return f"{value:{plus}.{digits}g}"
    return f"{value:{plus}.{digits}f}"


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested mappings: ("chosen auc", 0.8), ..."""
    for key, part in value.items():
        name = f"{prefix} {key}".strip()
        if isinstance(part, Mapping):
            yield from flat(part, name)
        else:
            yield name, part


def _table(title: str, *columns: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if column in ("model", "pairs") and place < 2 else "right")
    return made


def render(made: Table) -> str:
    """A table as plain text of at most WIDTH columns, wide characters counted as two."""
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))
