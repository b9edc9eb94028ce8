"""Models of a run read its data: span log-probabilities, shard by shard, what is there already is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.annotate.store import Column, shard_ranges
from ctpd_jax.annotate.teacher import Scorer, make_scorer, plain_item, score_pairs
from ctpd_jax.artifacts import read_json, write_json
from ctpd_jax.data.loader import padding, plan_shapes
from ctpd_jax.data.packing import in_words
from ctpd_jax.data.rows import BatchShape, PairItem
from ctpd_jax.errors import UserError
from ctpd_jax.processes import preempt
from ctpd_jax.run import Run, Split
from ctpd_jax.schema import CHOSEN, REJECTED, AlignedPair, Array, Batch, Model
from ctpd_jax.settings import base_dtype
from ctpd_jax.sharding import first_process, place_batch, place_rows, told_by_first
from ctpd_jax.text.prepare import steered_prompt
from ctpd_jax.train.metrics import Progress
from ctpd_jax.train.step import Params, compiled_programs

Measured = list[tuple[np.ndarray, np.ndarray]]  # per pair: span log-probabilities of chosen and rejected, float32 [S]


def score_column(
    run: Run, split: Split, name: str, stage: str, model: Model, instruction: str | None = None, weights: str = ""
) -> Measured:
    """What the model that a stage left makes of a split, read with `weights`, or else with those of `weights_of`."""
    return score_together(run, split, {name: stage}, model, instruction, weights)[name]


def score_together(
    run: Run,
    split: Split,
    stages: Mapping[str, str],
    model: Model,
    instruction: str | None = None,
    weights: str = "",
) -> dict[str, Measured]:
    """Columns that are measured in one pass over a split: {name: stage}, several only as adapters over one base."""
    weights = weights or weights_of(run, split, next(iter(stages.values())), model)

    def columns_of() -> dict[str, Column]:
        return {name: _column(run, split, name, stage, model, instruction, weights) for name, stage in stages.items()}

    def look() -> tuple[int, list[int]]:
        size = shard_size(run, split)
        shards = len(shard_ranges(len(run.pairs(split)), size))
        return size, sorted(set().union(*(column.missing_shards(shards) for column in columns_of().values())))

    # One process says what is missing: each from its own view of a shared folder could leave a shard to nobody.
    size, missing = told_by_first(look)
    ranges, columns = shard_ranges(len(run.pairs(split)), size), columns_of()
    # Each process takes its share; what one that died has left undone is missing again for those that come after.
    run, missing = run.here, missing[jax.process_index() :: jax.process_count()]
    with preempt.apart(f"{split}/{'+'.join(stages)} is measured"):
        if missing:
            pairs, items = run.pairs(split), _items(run, split, model, instruction)
            spans = _spans(pairs, model)
            scorer, program = reader(run, list(stages.values()), model, weights)
            shapes = plan_shapes(items, ranges, run.config.annotate.micro_batch, run.rows)
            share = padding(items, ranges[:16], run.config.annotate.micro_batch, run.rows, shapes)
            run.say(f"{_home(split)}/{'+'.join(stages)}: {in_words(share)}")
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


def shard_size(run: Run, split: Split) -> int:
    """Pairs of a shard, as they were when the first one was begun: another setting would move every boundary."""
    path, wanted = run.workdir / _home(split) / "shards.json", run.config.annotate.pairs_per_shard
    if (known := read_json(path)) is None:
        known = {"pairs_per_shard": wanted}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    if known["pairs_per_shard"] != wanted:
        size = known["pairs_per_shard"]
        run.say(f"{path.parent} keeps its shards of {size} pairs; annotate.pairs_per_shard is {wanted} now.")
    return known["pairs_per_shard"]


def weights_of(run: Run, split: Split, stage: str, model: Model) -> str:
    """The dtype of the parameters that a model reads with where no stage's reference asks for another one."""
    start = split == "train" and model == "student" and stage == "student_sft"
    return base_dtype(run.config, "train") if start else run.reading_dtype(model)


def reference_of(run: Run, stage: str, model: Model) -> Measured:
    """What a stage's own start makes of the training pairs: the same numbers that its policy begins with."""
    name, dtype, sft = "reference" if model == "teacher" else "start", base_dtype(run.config, stage), f"{model}_sft"
    if dtype != weights_of(run, "train", sft, model):  # the annotations' column of that name is of another start
        name = f"{name}_{dtype}"
    return score_column(run, "train", name, sft, model, weights=dtype)


def reader(run: Run, stages: Sequence[str], model: Model, dtype: str) -> tuple[Scorer, Any]:
    """The models that stages left, ready to read in one pass with such weights, and the jitted program in it."""
    adapters: Params = {}
    if run.left_out(stages[0]) or stages[0] == f"{model}_sft":
        config, base = run.start(model, dtype)
    elif run.trained_decoder(stages[0], model).lora is None:
        config, base = run.decoder(model), run.params_of(stages[0], model, dtype)
    else:
        config, base = run.running_decoder(stages[0], model, dtype), run.base(stages[0], model, dtype)
        adapters = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(run.adapters(stage, model) for stage in stages))
    score, mesh = make_scorer(config, run.compute(model)), run.mesh
    return lambda batch, slots: score(adapters, base, place_batch(mesh, batch), place_rows(mesh, slots)), score


def _column(
    run: Run, split: Split, name: str, stage: str, model: Model, instruction: str | None, weights: str
) -> Column:
    identity = {
        "params": run.identity(stage, model),
        "model": model,
        "weights": weights,
        "instruction": instruction,
        "data": run.data_identity(split),
        "compute": run.compute(model).dtype,
    }
    # Held-out scores are cheap and follow whatever was trained last; annotations are not thrown away unasked.
    return Column(run.workdir / _home(split), name, identity, split == "test", first_process())


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


def compare_rounded(run: Run, columns: Mapping[str, tuple[str, Model, str | None]]) -> None:
    """Reads the first pairs with the contrastive pair as it was trained and as it will be read, and tells what is left.

    Adapters stay what they are over a rounded base. A pair that was trained whole is rounded itself: where training
    moved it by less than that, log pi+ - log pi- is mostly the rounding.
    """
    count, path = run.config.annotate.compared_pairs, run.workdir / "annotations" / "rounded.json"
    chosen = {
        name: (stage, model)
        for name, (stage, model, _) in columns.items()
        if name in ("positive", "negative") and not stage.endswith("_sft")
        if run.trained_decoder(stage, model).lora is None and weights_of(run, "train", stage, model) != "float32"
    }
    measured = {"pairs": count, **{name: run.identity(stage, model) for name, (stage, model) in chosen.items()}}
    if not chosen or not count or (read_json(path) or {}).get("measured") == measured:
        return
    pairs, ratios = run.pairs("train"), []
    places = range(min(count, len(pairs)))
    for rounded in (False, True):
        sums: list[np.ndarray] = []
        for name, (stage, model, _) in columns.items():
            if name in ("positive", "negative"):
                items, dtype = _items(run, "train", model, None), weights_of(run, "train", stage, model)
                scorer, _ = reader(run, [stage], model, dtype if rounded else "float32")
                shapes = plan_shapes(items, [places], run.config.annotate.micro_batch, run.rows)
                (found,) = _read(run, scorer, items, places, _spans(pairs, model), shapes)
                sums.append(np.concatenate([values for both in found for values in both]))
                del scorer  # and its model: two do not fit where one does
        ratios.append(sums[0] - sums[1])
    # Where rounding leaves nothing the ratio is flat, and has no correlation with anything.
    flat = any(np.ptp(ratio) == 0 for ratio in ratios)
    correlation = 0.0 if flat else float(np.corrcoef(ratios)[0, 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"measured": measured, "correlation": correlation})
    run.say(
        f"The contrastive pair in bfloat16: over {len(places)} pairs log pi+ - log pi- correlates "
        f"{correlation:.3f} with that of float32."
        + (" Most of it is rounding: set annotate.teacher_weights=float32." if not correlation > 0.9 else "")
    )
