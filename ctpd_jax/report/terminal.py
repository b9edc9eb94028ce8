"""What a run shows in a terminal: the counts of its data, one aligned pair span by span, and the table at the end."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctpd_jax.report import format as wording
from ctpd_jax.schema import SIDES, Counters
from ctpd_jax.text.read_row import HARMLESS

WIDTH = 110  # columns of the example and of the table
MAX_SPANS = 40  # of one response
MAX_PROMPT = 400  # characters of one message
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


def example_text(example: Mapping[str, Any]) -> str:
    """Return an aligned pair as text: both responses span by span, for both tokenizers.

    Args:
      example: as evaluation.json holds it: id, source, prompt (messages), and chosen and rejected with their spans.
    """
    parts = [wording.harmless(f"Pair {example['id']}  {example['source']}".rstrip())]
    for message in example["prompt"]:
        content = wording.harmless(message["content"])
        if len(content) > MAX_PROMPT:
            content = f"{content[:MAX_PROMPT]} ... and {len(content) - MAX_PROMPT} characters more"
        parts.append(f"{message['role']}: {content}")
    return "\n".join([*parts, *(_side_text(name, example[name]) for name in SIDES)])


def _side_text(name: str, side: Mapping[str, Any]) -> str:
    spans: Sequence[Mapping[str, Any]] = side["spans"]
    columns = ("text", "teacher tokens", "student tokens")
    table = _table(wording.side_title(name, side), ["span", *columns, "m:n", "weight"], left=columns)
    for number, span in enumerate(spans[:MAX_SPANS]):
        # As Text, because rich would read markup in a plain string.
        tokens = [Text(wording.tokens_text(span[model])) for model in ("teacher", "student")]
        facing = f"{len(span['teacher'])}:{len(span['student'])}"
        weight = wording.figure(span.get("weight"), 2)
        table.add_row(str(number), Text(wording.span_text(span)), *tokens, facing, weight)
    more = len(spans) - MAX_SPANS
    return _render(table) + (f"\n  ... and {more} more spans" if more > 0 else "")


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


def _render(table: Table) -> str:
    """Return a table as plain text of at most WIDTH columns, wide characters counted as two."""
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))
