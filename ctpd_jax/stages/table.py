"""`ctpd table`: the pairs of a run as a Parquet file, and once they are annotated what was measured, and their weights.

Before annotation it says which tokens a teacher that is elsewhere has to be asked about (config.annotate.table takes it
back, with log-probabilities); after it, it can be looked at with ordinary tools and used by other trainers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ctpd_jax.annotate.coefficients import Example, margin_values, span_values
from ctpd_jax.annotate.store import Store
from ctpd_jax.artifacts import PARTIAL
from ctpd_jax.buckets.objects import at_hand
from ctpd_jax.errors import UserError
from ctpd_jax.job.job import Job
from ctpd_jax.job.pairs import Pairs, load_pairs
from ctpd_jax.job.score import prompts_of
from ctpd_jax.job.table import columns
from ctpd_jax.schema import MODELS, SIDES, AlignedPair
from ctpd_jax.sharding import first_process
from ctpd_jax.stages.inspect import annotated
from ctpd_jax.train.metrics import Progress

TOGETHER = 1024  # pairs in memory

Prompt = Callable[[AlignedPair], np.ndarray | None]


def write_table(job: Job, out: Path) -> None:
    """Writes the training pairs to `out`, a row each; docs/elsewhere.md lists the columns."""
    import pyarrow
    import pyarrow.parquet

    # 1. What there is; and a place for it, before anything takes long.
    beside = place_for(job, out)
    pairs = load_pairs(job, "train")
    store = annotated(job, pairs)
    prompts: dict[str, Prompt] = {
        f"{name}_prompt": prompts_of(job, pairs, column.model, column.instruction)
        for name, column in columns(job.config).items()
        if column.instruction is not None
    }
    if not first_process():
        return
    # 2. Some pairs after the other, beside the place where the whole is to lie.
    followed = job.config.train.objective != "ctpd"
    schema = pyarrow.schema(fields(store, list(prompts), followed))
    with (
        pyarrow.parquet.ParquetWriter(beside, schema, compression="zstd") as writer,
        Progress(len(pairs.aligned), "table", unit="pair") as progress,
    ):
        for rows in chunks(job, pairs, store, prompts):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            progress.update(len(rows))
    os.replace(beside, out)
    job.say(f"{out}: {len(pairs.aligned)} pairs, {'annotated' if store else 'not annotated yet'}.")


def place_for(job: Job, out: Path) -> Path:
    """The file beside `out` that is written first.

    Raises:
        UserError: `out` cannot be a table, or it is the one that was given.
    """
    # 1. What is there may be replaced by a table, if it is a file and not what others have measured.
    given = at_hand(job.config.annotate.table).resolve() if job.config.annotate.table else None
    if given and given in (out.resolve(), out.resolve().parent) and given.exists():
        raise UserError(f"--out {out} is config.annotate.table: what was measured would be lost; name another file.")
    if not out.name or (out.exists() and not out.is_file()):
        raise UserError(f"--out {out} is no file, and nothing else is replaced by one; name another.")
    # 2. May anything be written there?
    beside = out.with_name(out.name + PARTIAL)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        open(beside, "ab").close()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
    return beside


def fields(store: Store | None, prompts: list[str], followed: bool) -> list[tuple[str, Any]]:
    """The columns of the table, with their types; `followed`: the objective has targets."""
    import pyarrow

    # Of the pair, then of each response: text, tokens and spans, and what was measured.
    text, ids, numbers = pyarrow.string(), pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
    found = [("id", text), *((f"{model}_prompt", ids) for model in MODELS), *((name, ids) for name in prompts)]
    found += [(name, pyarrow.float64()) for name in ("weight", "margin", *(("label", "pair_weight") if store else ()))]
    for side in SIDES:
        found += [(f"{side}_text", text), (f"{side}_truncated", pyarrow.bool_()), (f"{side}_bounds", ids)]
        found += [(f"{side}_{model}_{what}", ids) for model in MODELS for what in ("ids", "span_ids")]
        if store:
            found += [(f"{side}_{scorer}", numbers) for scorer in store.manifest["scorers"]]
            found += [(f"{side}_weights", numbers), (f"{side}_token_weights", numbers)]
            found += [(f"{side}_targets", numbers)] if followed else []
            found += [(f"{side}_constant", pyarrow.float64())]
    return found


def chunks(job: Job, pairs: Pairs, store: Store | None, prompts: dict[str, Prompt]) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of the table, some at a time."""
    config = job.config
    # What depends on all pairs, as training takes it.
    if store:
        worth = [(pair.id, pair.weight, pair.margin) for pair in pairs.aligned]
        lead, labels, of_pairs = margin_values(worth, config.train)
    for first in range(0, len(pairs.aligned), TOGETHER):
        some = pairs.aligned[first : first + TOGETHER]
        rows = [row_of(pair, pairs) | {name: prompt(pair) for name, prompt in prompts.items()} for pair in some]
        # With what was measured, and what training makes of that.
        if store:
            examples: list[Example] = [store[first + number] for number in range(len(some))]
            values, _ = span_values(examples, config.weights, config.train, config.seed, first)
            for place, row, (_, scores), both in zip(range(first, first + len(some)), rows, examples, values):
                row["label"] = 1.0 if labels is None else float(labels[place])
                row["pair_weight"] = 1.0 if of_pairs is None else float(of_pairs[place])
                for side, own in zip(SIDES, both):
                    row |= {f"{side}_{scorer}": each for scorer, each in scores[side].items()}
                    row |= {f"{side}_weights": own.weights, f"{side}_token_weights": own.token_weights}
                    row |= {f"{side}_constant": own.constant, f"{side}_targets": own.targets}
                row["chosen_constant"] += float(lead[place])
        yield rows


def row_of(pair: AlignedPair, pairs: Pairs) -> dict[str, Any]:
    """A pair as it is trained on, and its text."""
    # As it was written, and as both models read it.
    raw = pairs.raw[pair.id]
    row: dict[str, Any] = {"id": pair.id, "weight": pair.weight, "margin": pair.margin}
    row |= {f"{model}_prompt": pair.prompt(model) for model in MODELS}
    for side, (name, text) in enumerate(zip(SIDES, (raw.chosen, raw.rejected))):
        row |= {f"{name}_text": text, f"{name}_truncated": pair.truncated[side]}
        row[f"{name}_bounds"] = pair.response(side).bounds
        for model in MODELS:
            tokens = pair.tokens(model, side)
            row |= {f"{name}_{model}_ids": tokens.ids, f"{name}_{model}_span_ids": tokens.span_ids}
    return row
