"""Models of a run read its data: span log-probabilities, shard by shard, what is there already is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax import preempt
from ctpd_jax.annotate.store import Column, shard_ranges
from ctpd_jax.annotate.teacher import Scorer, make_scorer, plain_item, score_pairs
from ctpd_jax.data.loader import plan_shapes
from ctpd_jax.data.rows import BatchShape, PairItem
from ctpd_jax.errors import UserError
from ctpd_jax.files import write_json
from ctpd_jax.models.int8 import quantize
from ctpd_jax.run import Run, Split
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair, Array, Batch, Model
from ctpd_jax.sharding import barrier, first_process, place_batch, place_rows
from ctpd_jax.text.prepare import steered_prompt
from ctpd_jax.train.metrics import Progress
from ctpd_jax.train.step import compiled_programs

Measured = list[tuple[np.ndarray, np.ndarray]]  # per pair: span log-probabilities of chosen and rejected, float32 [S]


def score_column(
    run: Run, split: Split, name: str, stage: str, model: Model, instruction: str | None = None
) -> Measured:
    """What the model that a stage left makes of a split."""
    return score_together(run, split, {name: stage}, model, instruction)[name]


def score_together(
    run: Run, split: Split, stages: Mapping[str, str], model: Model, instruction: str | None = None
) -> dict[str, Measured]:
    """Columns that are measured in one pass over a split: {name: stage}, several only as adapters over one base."""
    ranges = shard_ranges(len(run.pairs(split)), run.config.annotate.pairs_per_shard)
    if first_process():  # makes the folders; the others find them
        columns = {name: _column(run, split, name, stage, model, instruction) for name, stage in stages.items()}
    barrier(f"the columns of {split}/{'+'.join(stages)} are there")
    if not first_process():
        columns = {name: _column(run, split, name, stage, model, instruction) for name, stage in stages.items()}
    missing = sorted(set().union(*(column.missing_shards(len(ranges)) for column in columns.values())))
    barrier("every process has counted the same missing shards")
    # Each process takes its share; what one that died has left undone is missing again for those that come after.
    run, missing = run.here, missing[jax.process_index() :: jax.process_count()]
    with preempt.apart(f"{split}/{'+'.join(stages)} is measured"):
        if missing:
            pairs, items = run.pairs(split), _items(run, split, model, instruction)
            spans = _spans(pairs, model)
            scorer, program = reader(run, list(stages.values()), model, weights_of(run, split, model))
            shapes = plan_shapes(items, ranges, run.config.annotate.micro_batch, run.rows)
            done = len(pairs) - sum(len(ranges[shard]) for shard in missing)
            logged = f"{_home(split)}/{'+'.join(stages)}"
            run.log.rewind(logged, missing[0] - 1)
            with Progress(len(pairs), f"{split}/{'+'.join(stages)}", done, unit="pair") as progress:
                for shard in missing:
                    places = ranges[shard]
                    found = _read(run, scorer, items, places, spans, shapes, progress.update)
                    for (name, column), scores in zip(columns.items(), found, strict=True):
                        _check_finite(run, name, stages[name], pairs, places, scores)
                        column.write(shard, [values for both in scores for values in both])
                    compiled = compiled_programs(logged, program, len(shapes))
                    run.log.log(logged, shard, {"pairs": len(places), "compiled_programs": compiled})
    measured = {}
    for name, column in columns.items():
        values = [array for shard in range(len(ranges)) for array in column.read(shard)]
        measured[name] = list(zip(values[::2], values[1::2], strict=True))
    return measured


def weights_of(run: Run, split: Split, model: Model) -> str:
    """What the model reads with: "float32", "bfloat16" or "int8", which is for the annotating teacher alone."""
    int8 = split == "train" and model == "teacher" and run.config.annotate.teacher_weights == "int8"
    return "int8" if int8 else run.reading_dtype(model)


def reader(run: Run, stages: Sequence[str], model: Model, weights: str) -> tuple[Scorer, Any]:
    """The models that stages left, ready to read in one pass with such weights, and the jitted program in it."""
    dtype = "float32" if weights == "int8" else weights
    config = run.decoder(model) if run.left_out(stages[0]) else run.trained_decoder(stages[0], model)
    if config.lora is None:
        base, adapters = run.params_of(stages[0], model, dtype), {}
    else:
        base = run.base(stages[0], model, dtype)
        adapters = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(run.adapters(stage, model) for stage in stages))
    if weights == "int8":
        config, base = quantize(config, base)
    score, mesh = make_scorer(config, run.compute(model)), run.mesh
    return lambda batch, slots: score(adapters, base, place_batch(mesh, batch), place_rows(mesh, slots)), score


def _column(run: Run, split: Split, name: str, stage: str, model: Model, instruction: str | None) -> Column:
    identity = {
        "params": run.identity(stage, model),
        "model": model,
        "weights": weights_of(run, split, model),
        "instruction": instruction,
        "data": run.data_identity(split),
        "compute": run.compute(model).dtype,
        "pairs_per_shard": run.config.annotate.pairs_per_shard,
    }
    # Held-out scores are cheap and follow whatever was trained last; annotations are not thrown away unasked.
    return Column(run.workdir / _home(split), name, identity, replace=split == "test")


def _home(split: Split) -> str:
    return "annotations" if split == "train" else "evaluation"


def _items(run: Run, split: Split, model: Model, instruction: str | None) -> list[PairItem]:
    """One model's view of every pair; with an instruction, behind it."""
    if instruction is None:
        return [plain_item(pair, model) for pair in run.pairs(split)]
    raw, text = run.raw(split), run.text(model)
    return [
        plain_item(pair, model, text.prompt(steered_prompt(raw[pair.id], pair.dropped, instruction)))
        for pair in run.pairs(split)
    ]


def _read(
    run: Run,
    scorer: Scorer,
    items: list[PairItem],
    places: Sequence[int],
    spans: Sequence[tuple[np.ndarray, np.ndarray]],
    shapes: Sequence[BatchShape],
    done: Callable[[int], object] = lambda pairs: None,
) -> list[Measured]:
    """Each column's span log-probabilities of the pairs at `places`, in batches of planned shapes."""
    some, own = [items[i] for i in places], [spans[i] for i in places]

    def score(batch: Batch, slot_spans: Array) -> Array:
        # Not after the shard: one of a large teacher takes longer than the grace of a preemption.
        preempt.check("the shards that are written are kept")
        return scorer(batch, slot_spans)

    return score_pairs(score, some, own, run.config.annotate.micro_batch, run.rows, shapes, done)


def _spans(pairs: Sequence[AlignedPair], model: Model) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(pair.tokens(model, CHOSEN).span_ids, pair.tokens(model, REJECTED).span_ids) for pair in pairs]


def _check_finite(
    run: Run, name: str, stage: str, pairs: Sequence[AlignedPair], places: Sequence[int], scores: Measured
) -> None:
    for place, both in zip(places, scores):
        if not all(np.isfinite(values).all() for values in both):
            raise UserError(
                f"{name}: a log-probability of pair {pairs[place].id} is not finite. Look at the model in "
                f"{run.workdir / stage}; a training that diverged wants a lower config.{stage}.lr."
            )


def compare_rounded(
    run: Run, columns: Mapping[str, tuple[str, Model, str | None]], measured: Mapping[str, Measured]
) -> None:
    """Lets the exact teacher read the first pairs too, and tells how far the int8 one is from it."""
    count, path = run.config.annotate.compared_pairs, run.workdir / "annotations" / "int8.json"
    chosen = {name: entry for name, entry in columns.items() if weights_of(run, "train", entry[1]) == "int8"}
    if not chosen or not count or path.exists():
        return
    pairs, errors = run.pairs("train"), {}
    places = range(min(count, len(pairs)))
    for name, (stage, model, instruction) in chosen.items():
        items = _items(run, "train", model, instruction)
        scorer, _ = reader(run, [stage], model, "float32")
        shapes = plan_shapes(items, [places], run.config.annotate.micro_batch, run.rows)
        exact = _read(run, scorer, items, places, _spans(pairs, model), shapes)[0]
        gaps = [abs(a - b) for one, other in zip(exact, measured[name]) for a, b in zip(one, other)]
        errors[name] = float(np.mean(np.concatenate(gaps)))
    write_json(path, {"pairs": len(places), "mean_absolute_error": errors})
    told = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    run.say(f"int8 teacher: mean absolute error of a span's log-probability in nats, over {len(places)} pairs: {told}.")
