"""What a run shows in a terminal: the counts of its data, one aligned pair span by span, and the table at the end."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ctpd_jax.report import format as wording
from ctpd_jax.schema import SIDES, Counters
from ctpd_jax.text.read_row import HARMLESS

WIDTH = 110  # columns of the example and of the table
LABEL = 9  # columns in front of a block of spans
MAX_SPANS = 120  # of one response
MAX_PROMPT = 400  # characters of one message
HOT, COLD = (236, 132, 54), (62, 148, 188)  # the page's colours of a weight above and below one
# Metrics of lm-eval that are shares, the preferred ones first.
SHARES = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")


def counts(counters: Counters) -> str:
    """Return what was read, cut and escaped; then the reasons for leaving out, and the columns left alone."""
    # The reasons have a table of their own, and rows and pairs are told with it.
    told = []
    for name, count in counters.counts.items():
        if count and name not in ("rows", "kept", *counters.left_out):
            told.append(f"{name} {count:,}")
    parts = ["; ".join(told), counters.reasons()]
    if columns := counters.notes.get(HARMLESS):
        parts.append(f"harmless columns: {', '.join(columns)}")
    return wording.harmless("\n  ".join(part for part in parts if part))


# ------------------------------------------------------------------------------------------------ one pair


def pair_text(pair: Mapping[str, Any], full: float | None = None, colour: bool = False) -> str:
    """Return an aligned pair as text: what both models read, and both tokenizations above each other, span by span.

    Args:
      pair: as evaluation.json holds it; see `report.pair.pair_record`.
      full: the |log weight| of the full colour, as `format.full_colour` returns it.
      colour: escape sequences for a terminal: warm spans weigh more than one, cold ones less.
    """
    parts = [Text(wording.harmless(f"Pair {pair['id']}  {pair['source']}".rstrip()), style="bold")]
    for message in pair["prompt"]:
        parts.append(Text(f"{message['role']}: {_shortened(wording.harmless(message['content']))}"))
    # The prompts token by token, because what a template adds is what goes wrong.
    for model, tokens in (pair.get("read") or {}).items():
        said = "¦".join(map(wording.visible, tokens))
        parts.append(Text.assemble((f"{model} reads {len(tokens)} tokens: ", "dim"), _shortened(said, last=True)))
    for name in SIDES:
        parts += [Text(wording.side_title(name, pair[name]), style="bold"), *_flow(pair[name]["spans"], full)]
    return _render(Group(*parts), colour)


def _shortened(text: str, last: bool = False) -> str:
    """Return the beginning of a text, and with `last` its end too."""
    if len(text) <= MAX_PROMPT:
        return text
    more = f"and {len(text) - MAX_PROMPT} characters more"
    return (
        f"{text[: MAX_PROMPT // 2]} ... {more} ... {text[-MAX_PROMPT // 2 :]}"
        if last
        else f"{text[:MAX_PROMPT]} ... {more}"
    )


def _flow(spans: Sequence[Mapping[str, Any]], full: float | None) -> Iterator[Text]:
    """Yield the lines of a response: blocks of spans beside one another, each with a line for every row that it has."""
    # 1. Which rows there are: weights and the teacher's log-probabilities are known after annotation alone.
    rows = ["teacher", "student"]
    rows += ["weight"] if any(span["weight"] is not None for span in spans) else []
    rows += ["log π"] if any("reference" in (span.get("logps") or {}) for span in spans) else []
    # 2. Spans fill a line of the terminal, and then the next one.
    block: list[list[str]] = []
    styles: list[str] = []
    room = WIDTH - LABEL
    for span in spans[:MAX_SPANS]:
        cells = [_cropped(_cell(row, span)) for row in rows]
        width = max(map(cell_len, cells)) + 3
        if block and width > room:
            yield from _lines(rows, block, styles)
            block, styles, room = [], [], WIDTH - LABEL
        room -= width
        block.append(cells)
        styles.append(_background(span["weight"], full))
    if block:
        yield from _lines(rows, block, styles)
    if len(spans) > MAX_SPANS:
        yield Text(f"... and {len(spans) - MAX_SPANS} more spans", style="dim")


def _cell(row: str, span: Mapping[str, Any]) -> str:
    if row in ("teacher", "student"):
        return "¦".join(map(wording.visible, span[row]))
    return wording.figure(span["weight"], 2) if row == "weight" else f"{round(span['logps']['reference'], 2) + 0.0:.2f}"


def _cropped(text: str) -> str:
    return text if cell_len(text) <= WIDTH - LABEL - 3 else f"{set_cell_size(text, WIDTH - LABEL - 4)}…"


def _lines(rows: Sequence[str], block: Sequence[Sequence[str]], styles: Sequence[str]) -> Iterator[Text]:
    """Yield one line of text for each row of a block of spans, and an empty one."""
    widths = [max(map(cell_len, cells)) for cells in block]
    for number, row in enumerate(rows):
        line = Text(row.ljust(LABEL), style="dim", end="")
        for cells, width, style in zip(block, widths, styles):
            # As Text, because rich would read markup in a plain string; wide characters count two.
            shown = Text(set_cell_size(cells[number], width), style=style if row in ("teacher", "student") else "")
            line = Text.assemble(line, shown, (" │ ", "dim"))
        line.rstrip()
        yield line
    yield Text("")


def _background(weight: float | None, full: float | None) -> str:
    """Return a style in the colours of the page: as far from 1 as the weight is, in logarithms."""
    strength = wording.strength(weight, full)
    if strength is None or abs(strength) < 0.05:
        return ""
    ink = HOT if strength > 0 else COLD
    return "on rgb({},{},{})".format(*(round(255 - (255 - one) * abs(strength)) for one in ink)) + " black"


# ------------------------------------------------------------------------------------------------ many pairs


def statistics_text(found: Mapping[str, Any]) -> str:
    """Return what `text.statistics.span_statistics` and `stages.inspect` have found as tables."""
    # 1. Spans, by side, length and script.
    columns = ["responses", "spans", "1:1 %", "1:n %", "n:1 %", "m:n %", "teacher tok/span", "student tok/span"]
    columns += ["bytes kept %", "cut %"]
    table = _table("Spans of a response, on average (teacher tokens : student tokens)", ["", *columns], left=("",))
    for name, group in found["groups"].items():
        shares = [f"{100 * group[facing]:.1f}" for facing in ("one_one", "one_many", "many_one", "many_many")]
        sizes = [f"{group[model]:.2f}" for model in ("teacher", "student")]
        kept = [f"{100 * group[share]:.1f}" for share in ("bytes_kept", "cut")]
        table.add_row(name, f"{group['responses']:,}", f"{group['spans']:.1f}", *shares, *sizes, *kept)
    told = [_render(table)]
    # 2. Weights, once the pairs were annotated.
    if weights := found.get("weights"):
        clipped = "; ".join(f"{name} {wording.percent(share)}" for name, share in weights["shares"].items())
        told.append(f"Weights of spans: {clipped}")
    if weights and weights.get("histogram"):
        bars = _table("log π+ / π- of a span, nats", ["from", "to", "share", ""], left=("",))
        most = max(weights["histogram"])
        for low, high, share in zip(weights["edges"], weights["edges"][1:], weights["histogram"]):
            bars.add_row(f"{low:+.2f}", f"{high:+.2f}", wording.percent(share), "█" * round(50 * share / most))
        told.append(_render(bars))
    return "\n".join(told)


# ------------------------------------------------------------------------------------------------ the end table


def evaluation_text(evaluation: Mapping[str, Any]) -> str:
    """Return evaluation.json as text: accuracies, then the other figures, then the baseline."""
    models: Mapping[str, Mapping[str, Any]] = evaluation["models"]
    # 1. A block of rows for each model, one row for each subset of the pairs.
    title = f"How often the chosen response is preferred, % [95 % interval], {evaluation['pairs']} pairs"
    accuracies = _table(title, ["model", "pairs", *wording.SENSES.values()], left=("model", "pairs"))
    for name, row in models.items():
        for place, (subset, label) in enumerate(wording.SUBSETS.items()):
            found = row.get(subset) or {}
            cells = [wording.share(found.get(sense)) for sense in wording.SENSES]
            accuracies.add_row(wording.harmless(name) if place == 0 else "", label, *cells)

    # 2. Margins, lambda and bits per byte.
    others = _table("Other figures", ["model", *wording.other_figures({})], left=("model",))
    for name, row in models.items():
        others.add_row(wording.harmless(name), *wording.other_figures(row).values())

    # 3. What the accuracies are held against: the length of the answers, and what the data have in common.
    lines = ["Baseline, the longer response is the chosen one:"]
    for subset, label in wording.SUBSETS.items():
        longer = (evaluation.get("longer_is_better") or {}).get(subset)
        lines.append(f"  {label + ' pairs':21} {wording.share(longer)}   n = {longer['count'] if longer else 0}")
    return "\n".join([_render(accuracies), _render(others), *lines, *wording.data_lines(evaluation.get("data"))])


def harness_text(models: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Return lm-eval's results of models, model -> task -> metric -> figure, as text: one metric of each task.

    Shares are told in per cent, and averaged.
    """
    # 1. The metric of each task: as the paper reports its six, or the first figure that there is.
    first, metrics = next(iter(models.values())), {}
    for task in tasks:
        others = [key for key, value in first.get(task, {}).items() if isinstance(value, float)]
        metrics[task] = next((key for key in (*SHARES, *others) if key in first.get(task, {})), "")
    columns = [f"{task} {metric.partition(',')[0]}" for task, metric in metrics.items()]
    # 2. A row for each model.
    table = _table("lm-eval, shares in %", ["model", *columns, "average"], left=("model",))
    for name, found in models.items():
        figures = {task: found.get(task, {}).get(metric) for task, metric in metrics.items()}
        shares = {task: 100 * figures[task] for task, metric in metrics.items() if metric in SHARES}
        average = sum(shares.values()) / len(shares) if shares else None
        shown = [*(figures | shares).values(), average]
        table.add_row(wording.harmless(name), *(wording.figure(value, 2) for value in shown))
    return _render(table)


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    """Return a table without rows; the columns `left` hold text, the others figures."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table


def _render(shown: Any, colour: bool = False) -> str:
    """Return what rich draws as text of at most WIDTH columns, wide characters counted as two."""
    out = io.StringIO()
    colours: Any = {"force_terminal": True, "color_system": "truecolor"} if colour else {"color_system": None}
    Console(file=out, width=WIDTH, highlight=False, markup=False, emoji=False, **colours).print(shown)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))
