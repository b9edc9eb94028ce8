"""The stages that train and annotate. Each one is finished, goes on where it stopped, or begins."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ctpd_jax import preempt
from ctpd_jax.annotate.coefficients import training_items
from ctpd_jax.annotate.store import MANIFEST, open_store, shard_ranges, to_record, write_store
from ctpd_jax.data.loader import batch_indices, padding, plan_shapes, steps_per_epoch, update_batches
from ctpd_jax.data.packing import in_words
from ctpd_jax.data.rows import PairItem, ScoredResponse
from ctpd_jax.errors import UserError
from ctpd_jax.files import canonical_json, sha256_file
from ctpd_jax.measure import Measured, compare_rounded, reference_of, score_together, shard_size, weights_of
from ctpd_jax.models.hf.families import FAMILIES
from ctpd_jax.models.lora import adapter_shapes, init_adapters
from ctpd_jax.run import Run, dtype_of, params_digest
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES, AlignedPair, Model
from ctpd_jax.settings import base_dtype, learns_responses, trained_model
from ctpd_jax.sharding import barrier, first_process, patiently, told_by_first
from ctpd_jax.train.checkpoint import save_params
from ctpd_jax.train.loop import train
from ctpd_jax.train.step import Objective, Params, preference_sums, sft_sums
from ctpd_jax.workdir import begin, finish, read_json

# ------------------------------------------------------------------------------------------------ training


def check_trainable(run: Run, stage: str) -> None:
    """Refuses to train what is for scoring alone, and adapters on matrices that the model does not have."""
    model = trained_model(run.config, stage)
    if not FAMILIES[run.decoder(model).family].trainable:
        raise UserError(
            f"{stage}: the {model} {run.folder(model)} is a mixture of experts; those can score, but are not trained. "
            f"Set config.{stage}.steps=-1, or for the contrastive pair config.weights.source=prompts."
        )
    run.trained_decoder(stage, model)


def train_stage(
    run: Run, stage: str, model: Model, kind: str, items: Sequence[PairItem], inputs: dict, figures: dict
) -> None:
    """Trains `model`, or adapters on it, on SFT ("sft") or pairs ("pairs")."""
    check_trainable(run, stage)
    settings: ConfigDict = run.config[stage]
    directory = run.workdir / stage
    epoch = steps_per_epoch(len(items), settings.batch_size)
    steps = settings.steps or max(1, round(settings.epochs * epoch))
    inputs = {
        "settings": run.fingerprint(stage) | {"steps": steps},
        "seed": run.config.seed,
        "compute": run.compute(model).dtype,
        "from": run.base_identity(stage, model),
        **inputs,
    }
    noted = {"micro_batch": settings.micro_batch, "rows": run.config.rows.to_dict()}
    if told_by_first(lambda: begin(directory, inputs, noted, run.say)) is not None:
        if first_process():
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        run.say(f"{stage}: finished before.")
        return
    decoder, compute = run.trained_decoder(stage, model), run.compute(model)
    dtype = base_dtype(run.config, stage)
    if dtype == "bfloat16" and not (run.left_out(sft := f"{model}_sft") or stage == sft or run.config[sft].lora.rank):
        run.say(
            f"{stage}: its base is {sft}'s result rounded to bfloat16, which drops what moved an entry by less than "
            f"0.2 %; adapters ({sft}.lora.rank) would be kept beside it."
        )
    running = run.running_decoder(stage, model, dtype)
    if kind == "sft":
        sums_of = partial(sft_sums, running, compute)
    else:
        objective = Objective(settings.beta, settings.label_smoothing, settings.loss, settings.sft_weight)
        sums_of = partial(preference_sums, running, objective, compute)
    seed, batch_size = run.config.seed, settings.batch_size
    updates = (batch_indices(seed, step, len(items), batch_size) for step in range(steps))
    shapes = plan_shapes(items, updates, settings.micro_batch, run.rows)
    some = [batch_indices(seed, step, len(items), batch_size) for step in range(min(steps, 64))]
    run.say(f"{stage}: {in_words(padding(items, some, settings.micro_batch, run.rows, shapes))}")
    batches = update_batches(items, seed, batch_size, settings.micro_batch, run.rows, shapes)
    adapted = decoder.lora is not None
    if adapted:
        initial: Callable[[], Params] = partial(init_adapters, decoder, jax.random.key(run.config.seed))
    else:
        initial = partial(run.base, stage, model)
    params = train(
        stage,
        directory / "checkpoints",
        settings,
        steps,
        initial,
        adapter_shapes(decoder) if adapted else run.abstract(model),
        sums_of,
        batches,
        len(shapes),
        run.log,
        figures,
        run.config.log_every,
        frozen=run.base(stage, model, dtype) if adapted else None,
        mesh=run.mesh,
    )
    save_params(directory / "params", params, {"stage": stage, "steps": steps})
    digest = params_digest(params)
    if adapted:  # adapters alone do not say which model this is
        digest = hashlib.sha256(f"{inputs['from']} {digest}".encode()).hexdigest()
    if first_process():
        finish(directory, {"params": digest, "steps": steps, **figures})
        shutil.rmtree(directory / "checkpoints")
    barrier(f"{stage} is finished")


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
            responses.append(ScoredResponse(ids, np.ones(len(ids), np.float32), total, total, total))
        return PairItem(pair.prompt(model), *(responses[::-1] if swapped else responses))

    return [item(pair, scores) for pair, scores in zip(pairs, reference, strict=True)]


def sft(run: Run, stage: str) -> None:
    model = trained_model(run.config, stage)
    if run.left_out(stage):
        run.say(f"{stage}: left out (config.{stage}.steps = -1).")
        return
    items = sft_items(run.pairs("train"), model)
    train_stage(run, stage, model, "sft", items, {"data": run.data_identity("train")}, {})


def contrast(run: Run, stage: str) -> None:
    """Trains `positive`, `negative` (sides swapped) or `student_dpo`: DPO, or SFT on one side, from the SFT model."""
    if run.left_out(stage):
        run.say(f"{stage}: left out.")
        return
    model = trained_model(run.config, stage)
    pairs = run.pairs("train")
    inputs = {"data": run.data_identity("train"), "model": model}
    if learns_responses(run.config, stage):
        side = CHOSEN if stage == "positive" else REJECTED
        items = sft_items(pairs, model, side)
        train_stage(run, stage, model, "sft", items, inputs | {"source": "sft"}, {})
        return
    reference = reference_of(run, stage, model)
    items = dpo_items(pairs, model, reference, swapped=stage == "negative")
    train_stage(run, stage, model, "pairs", items, inputs | {"source": "dpo"}, {})


# ------------------------------------------------------------------------------------------------ annotation


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


def read_together(run: Run) -> list[dict[str, str]]:
    """The columns as {name: stage}, those whose models are adapters of one shape over one base together."""
    groups: dict[object, dict[str, str]] = {}
    for name, (stage, model, _) in scorers(run).items():
        trained = not stage.endswith("_sft") and not run.left_out(stage)
        adapted = run.trained_decoder(stage, model).lora if trained else None
        key = (model, run.base_identity(stage, model), adapted) if adapted else name
        groups.setdefault(key, {})[name] = stage
    return list(groups.values())


def data_settings(run: Run, names: Iterable[str]) -> dict:
    """The settings of the data that decide its pairs, among `names`."""
    return {name: value for name, value in run.config.data.to_dict().items() if name in names}


def source_of(run: Run) -> dict:
    """Where the training pairs come from; of a file that is there, also its SHA-256."""
    data = run.config.data
    if data.train == "toy":
        return {"train": "toy", "seed": run.config.seed, **run.config.toy.to_dict()}
    found, path = {"train": data.train, "split": data.train_split}, Path(data.train).expanduser()
    return found | {"sha256": sha256_file(path)} if path.is_file() else found


def same_source(run: Run, stored: Mapping) -> dict:
    """What the manifest has to say of the data: of a file its bytes, wherever it lies, else its name."""
    found = source_of(run)
    if "sha256" in found and "sha256" in stored:
        return {"sha256": found["sha256"]} if found["sha256"] == stored["sha256"] else found
    return {name: value for name, value in found.items() if name != "sha256"}


def measurements(run: Run) -> dict:
    """Of every column, what was asked of the model that measured it."""
    return {
        name: {"tokens": model, "instruction": instruction, "weights": weights_of(run, "train", stage, model)}
        for name, (stage, model, instruction) in scorers(run).items()
    }


def known_without_teacher(run: Run, stored: Mapping) -> dict:
    """The part of the manifest that training can check with the student and the config alone, given the stored one.

    Settings are compared where nothing measured is at hand; of a model that is, its digest. What needs no contrastive
    pair takes a store that has one.
    """
    settings = stored.get("settings", {})
    contrastive = run.config.weights.source not in ("uniform", "random")
    identities = {
        name: run.identity(stage, model)
        for name, (stage, model, _) in scorers(run).items()
        if (model == "student" if run.left_out(stage) else run.result(stage) is not None)
    }
    return {
        "settings": {
            "data": data_settings(run, settings.get("data", ())),
            "scorers": measurements(run),
        }
        | ({"weights_source": run.config.weights.source} if contrastive else {}),
        "source": same_source(run, stored.get("source", {})),
        "compute": dtype_of(run.config, run.mesh),
        "student": run.text_digest("student") | {"start": run.identity("student_sft", "student")},
        "measured_by": identities,
    }


def teacher_identity(run: Run) -> dict:
    """The teacher's part of the manifest: checked wherever the teacher's folder can be read."""
    return {"teacher": run.text_digest("teacher") | {"weights": run.weights_digest("teacher")}}


def manifest(run: Run) -> dict:
    """What the annotations were made from: what was measured, by digest, and what asked for it."""
    identity = run.data_identity("train")
    return {
        "settings": {
            "data": data_settings(run, ("limit", "columns", "ignore", "ranked", "strip_template", *identity)),
            "scorers": measurements(run),
            "weights_source": run.config.weights.source,
        },
        "source": source_of(run),
        "compute": dtype_of(run.config, run.mesh),
        "student": run.text_digest("student") | {"start": run.identity("student_sft", "student")},
        "data": identity,
        "measured_by": {name: run.identity(stage, model) for name, (stage, model, _) in scorers(run).items()},
    } | teacher_identity(run)


def annotate(run: Run) -> None:
    with preempt.apart("the first pairs are compared"):
        if first_process():
            compare_rounded(run.here, scorers(run))
    columns: dict[str, Measured] = {}
    for together in read_together(run):
        names = list(together)
        _, model, instruction = scorers(run)[names[0]]
        columns |= score_together(run, "train", together, model, instruction)
    columns = {name: columns[name] for name in scorers(run)}
    with preempt.apart("the store is written"):
        if first_process():
            write_annotations(run.here, columns)


def write_annotations(run: Run, columns: Mapping[str, Measured]) -> None:
    """What every model made of the training pairs -> the store."""
    pairs = run.pairs("train")

    def record(i: int) -> dict:
        scores = {SIDES[side]: {name: column[i][side] for name, column in columns.items()} for side in range(2)}
        return to_record(pairs[i], scores)

    def records(shard: int, part: range) -> Iterator[dict]:
        preempt.check(f"everything is measured, {shard} shards of the store are written")
        return map(record, part)

    ranges = shard_ranges(len(pairs), shard_size(run, "train"))
    write_store(run.workdir / "annotations", ranges, records, list(columns), manifest(run))
    run.say(f"annotate: {len(pairs)} pairs in {run.workdir / 'annotations'}, measured by {', '.join(columns)}.")


def train_student(run: Run) -> None:
    """CTPD. Reads the store alone: no teacher is loaded here, and its folder need not be on this machine."""
    if run.left_out("train"):
        run.say("train: left out (config.train.steps = -1).")
        return
    config, folder = run.config, run.workdir / "annotations"
    stored = patiently(lambda: read_json(folder / MANIFEST)) or {}
    expected = known_without_teacher(run, stored)
    if teacher_is_here(config):
        expected |= teacher_identity(run)
    store = open_store(folder, expected)
    examples = [store[i] for i in range(len(store))]
    items, figures = training_items(examples, config.weights, config.train, config.seed)
    weights = config.weights.to_dict()
    inputs = {
        "weights": {name: value for name, value in weights.items() if not name.endswith("_prompt")},
        "annotations": hashlib.sha256(canonical_json(compared(store.manifest))).hexdigest(),
    }
    train_stage(run, "train", "student", "pairs", items, inputs, figures)


def teacher_is_here(config: ConfigDict) -> bool:
    path = config.teacher.path
    return Path(path).expanduser().is_dir() if path else config.data.train == "toy"


def compared(manifest: Mapping) -> dict:
    """What of a store's manifest decides its numbers beyond rounding: the versions and the shards do not."""
    told = ("written_with", "shards", "shard_pairs", "metadata")
    return {name: value for name, value in manifest.items() if name not in told}
