"""The stages that train and annotate. Each one is finished, goes on where it stopped, or begins."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ctpd_jax.annotate.coefficients import training_items
from ctpd_jax.annotate.store import Column, open_store, shard_ranges, to_record, write_store
from ctpd_jax.annotate.teacher import make_scorer, plain_item, score_pairs
from ctpd_jax.data.loader import steps_per_epoch, update_batches
from ctpd_jax.data.rows import PairItem, ScoredResponse
from ctpd_jax.errors import UserError
from ctpd_jax.files import canonical_json
from ctpd_jax.run import Run, Split, params_digest
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES, AlignedPair, Model
from ctpd_jax.text.prepare import steered_prompt
from ctpd_jax.train.checkpoint import save_params
from ctpd_jax.train.loop import train
from ctpd_jax.train.metrics import Progress
from ctpd_jax.train.step import Objective, preference_sums, sft_sums
from ctpd_jax.workdir import begin, finish

Measured = list[tuple[np.ndarray, np.ndarray]]  # per pair: span log-probabilities of chosen and rejected, float32 [S]


# ------------------------------------------------------------------------------------------------ training


def train_stage(
    run: Run, stage: str, model: Model, start: str, kind: str, items: Sequence[PairItem], inputs: dict, figures: dict
) -> None:
    """Trains `model` from the parameters that stage `start` left, on SFT ("sft") or pairs ("pairs")."""
    settings: ConfigDict = run.config[stage]
    directory = run.workdir / stage
    epoch = steps_per_epoch(len(items), settings.batch_size)
    steps = settings.steps or max(1, round(settings.epochs * epoch))
    inputs = {
        "settings": run.fingerprint(stage) | {"steps": steps},
        "seed": run.config.seed,
        "layout": run.config.rows.to_dict(),
        "compute": run.compute(model).dtype,
        "from": run.identity(start, model) if start != stage else run.weights_digest(model),
        **inputs,
    }
    if begin(directory, inputs) is not None:
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        run.say(f"{stage}: finished before.")
        return
    decoder, compute = run.decoder(model), run.compute(model)
    if kind == "sft":
        sums_of = partial(sft_sums, decoder, compute)
    else:
        objective = Objective(settings.beta, settings.label_smoothing, settings.loss, settings.sft_weight)
        sums_of = partial(preference_sums, decoder, objective, compute)
    batches = update_batches(
        items.__getitem__,
        len(items),
        run.config.seed,
        settings.batch_size,
        run.config.rows.layout,
        run.shapes(list(items)),
        settings.micro_batch,
    )
    params = train(
        stage,
        directory / "checkpoints",
        settings,
        steps,
        lambda: run.start_params(model) if start == stage else run.params_of(start, model),
        run.abstract(model),
        sums_of,
        batches,
        run.log,
        figures,
        run.config.log_every,
    )
    save_params(directory / "params", params, {"stage": stage, "steps": steps})
    finish(directory, {"params": params_digest(params), "steps": steps, **figures})
    shutil.rmtree(directory / "checkpoints")


def sft_items(pairs: Sequence[AlignedPair], model: Model, side: int = CHOSEN) -> list[PairItem]:
    """The responses of one side, every token counting once."""

    def item(pair: AlignedPair) -> PairItem:
        ids = pair.tokens(model, side).ids
        return PairItem(pair.prompt(model), ScoredResponse(ids, np.ones(len(ids), np.float32)), None)

    return [item(pair) for pair in pairs]


def dpo_items(pairs: Sequence[AlignedPair], model: Model, reference: Measured, swapped: bool = False) -> list[PairItem]:
    """Pairs for plain DPO: weights of one, c the reference's log-probability of the whole response."""

    def item(pair: AlignedPair, scores: tuple[np.ndarray, np.ndarray]) -> PairItem:
        responses = []
        for side in (CHOSEN, REJECTED):
            ids = pair.tokens(model, side).ids
            total = float(scores[side].sum(dtype=np.float64))
            responses.append(ScoredResponse(ids, np.ones(len(ids), np.float32), total, total))
        return PairItem(pair.prompt(model), *(responses[::-1] if swapped else responses))

    return [item(pair, scores) for pair, scores in zip(pairs, reference, strict=True)]


def sft(run: Run, stage: str) -> None:
    model: Model = "teacher" if stage == "teacher_sft" else "student"
    if run.left_out(stage):
        run.say(f"{stage}: left out (config.{stage}.steps = -1).")
        return
    items = sft_items(run.pairs("train"), model)
    train_stage(run, stage, model, stage, "sft", items, {"data": run.data_identity("train")}, {})


def contrast(run: Run, stage: str) -> None:
    """Trains `positive`, `negative` (sides swapped) or `student_dpo`: DPO, or SFT on one side, from the SFT model."""
    if run.left_out(stage):
        run.say(f"{stage}: left out.")
        return
    weights = run.config.weights
    model: Model = "student" if stage == "student_dpo" else weights[f"{stage}_scorer"]
    pairs, start = run.pairs("train"), f"{model}_sft"
    inputs = {"data": run.data_identity("train"), "model": model}
    if stage != "student_dpo" and weights.source == "sft":
        side = CHOSEN if stage == "positive" else REJECTED
        items = sft_items(pairs, model, side)
        train_stage(run, stage, model, start, "sft", items, inputs | {"source": "sft"}, {})
        return
    reference = score_column(run, "train", "reference" if model == "teacher" else "start", start, model)
    items = dpo_items(pairs, model, reference, swapped=stage == "negative")
    train_stage(run, stage, model, start, "pairs", items, inputs | {"source": "dpo"}, {})


# ------------------------------------------------------------------------------------------------ annotation


def score_column(
    run: Run, split: Split, name: str, stage: str, model: Model, instruction: str | None = None
) -> Measured:
    """One model reads the split and leaves span log-probabilities, shard by shard; what is there already is kept."""
    pairs = run.pairs(split)
    identity = {
        "params": run.identity(stage, model),
        "model": model,
        "instruction": instruction,
        "data": run.data_identity(split),
        "compute": run.compute(model).dtype,
        "pairs_per_shard": run.config.annotate.pairs_per_shard,
    }
    # Held-out scores are cheap and follow whatever was trained last; annotations are not thrown away unasked.
    home = run.workdir / ("annotations" if split == "train" else "evaluation")
    column = Column(home, name, identity, replace=split == "test")
    ranges = shard_ranges(len(pairs), run.config.annotate.pairs_per_shard)
    missing = column.missing_shards(len(ranges))
    if missing:
        raw = run.raw(split)

        def item(pair: AlignedPair) -> PairItem:
            if instruction is None:
                return plain_item(pair, model)
            prompt = run.text(model).prompt(steered_prompt(raw[pair.id], pair.dropped, instruction))
            return plain_item(pair, model, prompt)

        items = [item(pair) for pair in pairs]
        shapes, layout = run.shapes(items), run.config.rows.layout
        params = run.params_of(stage, model)
        scorer = make_scorer(run.decoder(model), run.compute(model))
        done = len(pairs) - sum(len(ranges[shard]) for shard in missing)
        with Progress(len(pairs), f"{split}/{name}", done, unit="pair") as progress:
            for shard in missing:
                places = ranges[shard]
                spans = [
                    (pairs[i].tokens(model, CHOSEN).span_ids, pairs[i].tokens(model, REJECTED).span_ids) for i in places
                ]
                found = score_pairs(
                    scorer,
                    params,
                    [items[i] for i in places],
                    spans,
                    layout,
                    shapes,
                    run.config.annotate.micro_batch,
                    progress.update,
                )
                for place, both in zip(places, found):
                    if not all(np.isfinite(values).all() for values in both):
                        raise UserError(
                            f"{name}: a log-probability of pair {pairs[place].id} is not finite. Look at the model in "
                            f"{run.workdir / stage}; a training that diverged wants a lower config.{stage}.lr."
                        )
                column.write(shard, [values for both in found for values in both])
    values = [array for shard in range(len(ranges)) for array in column.read(shard)]
    return list(zip(values[::2], values[1::2], strict=True))


def scorers(run: Run) -> dict[str, tuple[str, Model, str | None]]:
    """What annotation measures: column -> the stage whose model reads, on whose tokens, under which instruction."""
    weights = run.config.weights
    columns: dict[str, tuple[str, Model, str | None]] = {
        "reference": ("teacher_sft", "teacher", None),
        "start": ("student_sft", "student", None),
    }
    if weights.source in ("dpo", "sft"):
        columns["positive"] = ("positive", weights.positive_scorer, None)
        columns["negative"] = ("negative", weights.negative_scorer, None)
    elif weights.source == "prompts":
        for name, instruction in (("positive", weights.good_prompt), ("negative", weights.bad_prompt)):
            model = weights[f"{name}_scorer"]
            columns[name] = (f"{model}_sft", model, instruction)
    return columns


def known_without_teacher(run: Run) -> dict:
    """The part of the manifest that training can check with the student and the config alone."""
    data = run.config.data
    return {
        "settings": {
            "seed": run.config.seed,
            "data": {
                name: data[name]
                for name in ("limit", "max_prompt_tokens", "max_response_tokens", "unit", "end_of_turn")
            },
            "weights_source": run.config.weights.source,
            "scorers": {
                name: {"tokens": model, "instruction": instruction}
                for name, (_, model, instruction) in scorers(run).items()
            },
            **{stage: run.fingerprint(stage) for stage in ("teacher_sft", "student_sft", "positive", "negative")},
        },
        "compute": run.compute("teacher").dtype,
        "student": run.text_digest("student") | {"start": run.identity("student_sft", "student")},
    }


def teacher_identity(run: Run) -> dict:
    """The teacher's part of the manifest: checked wherever the teacher's folder can be read."""
    return {"teacher": run.text_digest("teacher") | {"weights": run.weights_digest("teacher")}}


def manifest(run: Run) -> dict:
    """What the annotations were made from: training refuses a store where any of it differs."""
    return (
        known_without_teacher(run)
        | teacher_identity(run)
        | {
            "data": run.data_identity("train"),
            "measured_by": {name: run.identity(stage, model) for name, (stage, model, _) in scorers(run).items()},
        }
    )


def annotate(run: Run) -> None:
    columns = {
        name: score_column(run, "train", name, stage, model, instruction)
        for name, (stage, model, instruction) in scorers(run).items()
    }
    pairs = run.pairs("train")

    def record(i: int) -> dict:
        scores = {SIDES[side]: {name: column[i][side] for name, column in columns.items()} for side in range(2)}
        return to_record(pairs[i], scores)

    ranges = shard_ranges(len(pairs), run.config.annotate.pairs_per_shard)
    write_store(run.workdir / "annotations", ranges, lambda _, part: map(record, part), list(columns), manifest(run))
    run.say(f"annotate: {len(pairs)} pairs in {run.workdir / 'annotations'}, measured by {', '.join(columns)}.")


def train_student(run: Run) -> None:
    """CTPD. Reads the store alone: no teacher is loaded here, and its folder need not be on this machine."""
    if run.left_out("train"):
        run.say("train: left out (config.train.steps = -1).")
        return
    config = run.config
    expected = known_without_teacher(run)
    if config.data.train == "toy" or Path(config.teacher.path).expanduser().is_dir():
        expected |= teacher_identity(run)
    store = open_store(run.workdir / "annotations", expected)
    examples = [store[i] for i in range(len(store))]
    items, figures = training_items(examples, config.weights, config.train, config.seed)
    inputs = {
        "weights": config.weights.to_dict(),
        "annotations": hashlib.sha256(canonical_json(store.manifest)).hexdigest(),
    }
    train_stage(run, "train", "student", "student_sft", "pairs", items, inputs, figures)
