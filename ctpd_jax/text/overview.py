"""`ctpd inspect --data`: what becomes of the rows of a data set, before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable

from ctpd_jax.errors import UserError
from ctpd_jax.schema import AlignedPair, Counters, PreferencePair
from ctpd_jax.text.columns import Reading
from ctpd_jax.text.dialogue import HH_SEPARATOR
from ctpd_jax.text.preferences import advice, read_preferences, refuse_templates, require_kept
from ctpd_jax.text.prepare import Limits, prepare_pairs
from ctpd_jax.text.prompts import TextModel, load_text_model
from ctpd_jax.text.read_row import HARMLESS, SEEN, UNKNOWN


def overview(
    spec: str,
    split: str,
    limit: int | None,
    reading: Reading,
    limits: Limits,
    models: list[tuple[str, str, str]],
    say: Callable[[str], None],
) -> tuple[list[AlignedPair], dict[str, PreferencePair], list[TextModel]]:
    """Print how a data set is read and, with two tokenizers, how it is cut; return the pairs, cut and as they came.

    Args:
      spec, split, limit, reading: as for `load_preferences`.
      limits: as for `prepare_pairs`.
      models: (folder, template, template_variables) of the teacher and of the student; empty: the rows are only read.
      say: prints.

    Raises:
      UserError: what would end a run, after the table.
    """
    # 1. Read, and align with both tokenizers; an error waits until the table has been printed.
    pairs, report = read_preferences(spec, split, limit, None, HH_SEPARATOR, reading)
    where = f'"{spec}" (split "{split}")'
    kept, failed, prepared = len(pairs), None, list[AlignedPair]()
    texts = [load_text_model(*model) for model in models]
    if texts and pairs:
        try:
            prepared, counters = prepare_pairs(pairs, texts[0], texts[1], limits)
            report.merge(counters)
            kept = len(prepared)
        except UserError as error:
            failed = error
    # 2. The table, and then the judgement of a run.
    say("\n".join([where, *table(report, kept), *_first_pair(pairs)]))
    if failed:
        raise failed
    refuse_templates(report, where, reading)
    require_kept(report, kept, where, reading.min_kept)
    return prepared, {pair.id: pair for pair in pairs}, texts


def table(report: Counters, kept: int) -> list[str]:
    """Write rows, reasons, counts and columns as lines."""
    reasons = report.left_out
    told = {name: number for name, number in report.counts.items() if name not in ("kept", "pairs", *reasons)}
    lines = [f"{number:>12,}  {name}" for name, number in {"rows": told.pop("rows", 0), "pairs used": kept}.items()]
    lines += [f"{number:>12,}  {name}{report.first(name)}" for name, number in reasons.items()]
    lines += [f"{number:>12,}  {name}" for name, number in told.items()]
    for name, what in ((SEEN, "columns"), (HARMLESS, "harmless columns"), (UNKNOWN, "fields not understood")):
        if names := report.notes.get(name):
            lines.append(f"{what}: {', '.join(names)}")
    return lines + advice(report).strip().splitlines()


def _first_pair(pairs: list[PreferencePair]) -> list[str]:
    """Write the first pair as it was understood, each text by its beginning."""
    if not pairs:
        return []
    said = [(message.role, message.content) for message in pairs[0].prompt]
    texts = [*said, ("chosen", pairs[0].chosen), ("rejected", pairs[0].rejected)]
    shown = [f"{name:>12}  {text[:80]!r}{' ...' if len(text) > 80 else ''}" for name, text in texts]
    return [f"first pair, {pairs[0].source}:", *shown]
