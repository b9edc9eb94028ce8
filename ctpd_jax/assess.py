"""The stages that look at what was trained, evaluate and export; and the commands inspect and generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import jax
import numpy as np

from ctpd_jax.annotate.coefficients import span_values
from ctpd_jax.annotate.store import MANIFEST, open_store
from ctpd_jax.errors import UserError
from ctpd_jax.evaluate.preferences import compare
from ctpd_jax.files import canonical_json, write_json
from ctpd_jax.models.generate import generate
from ctpd_jax.models.hf import save_hf
from ctpd_jax.report import show
from ctpd_jax.report.html import write_report
from ctpd_jax.run import Run
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES, Message, Model
from ctpd_jax.stages import score_column, scorers
from ctpd_jax.toy.recovery import recovery
from ctpd_jax.toy.world import true_reward
from ctpd_jax.train.metrics import read_metrics
from ctpd_jax.train.step import Params
from ctpd_jax.workdir import read_json

STARTS = {"student_dpo": "student_start", "ctpd": "student_start", "teacher_dpo": "teacher"}
SAMPLED_TOGETHER = 64  # prompts in one batch: what the cache of keys and values has room for
SHOWN = 6  # answers of each model in the report; the others are in evaluation/samples/


def rows(run: Run) -> dict[str, tuple[str, Model]]:
    """The models of the table: row -> the stage that made it, and whose tokens it reads."""
    table: dict[str, tuple[str, Model]] = {"student_start": ("student_sft", "student")}
    if not run.left_out("student_dpo"):
        table["student_dpo"] = ("student_dpo", "student")
    if not run.left_out("train"):
        table["ctpd"] = ("train", "student")
    table["teacher"] = ("teacher_sft", "teacher")
    weights = run.config.weights
    if not run.left_out("positive") and weights.source == "dpo" and weights.positive_scorer == "teacher":
        table["teacher_dpo"] = ("positive", "teacher")
    return table


# ------------------------------------------------------------------------------------------------ evaluate


def evaluate(run: Run) -> None:
    """Scores the held-out pairs with every model, samples from every model, and writes down what came of it."""
    pairs, table = run.pairs("test"), rows(run)
    columns = {name: score_column(run, "test", name, stage, model) for name, (stage, model) in table.items()}
    logps = {
        name: np.array([[scores.sum(dtype=np.float64) for scores in both] for both in column])
        for name, column in columns.items()
    }
    result: dict[str, Any] = compare(
        logps,
        covered=np.array([[pair.response(side).bounds[-1] for side in (CHOSEN, REJECTED)] for pair in pairs]),
        lengths=np.array([[pair.chosen_bytes, pair.rejected_bytes] for pair in pairs]),
        starts={row: start for row, start in STARTS.items() if row in table},
        students=[row for row, (_, model) in table.items() if model == "student"],
        teacher="teacher",
        betas={row: beta_of(run, stage) for row, (stage, _) in table.items()},
        tolerance=run.config.evaluate.length_tolerance,
    )
    result["pairs"] = len(pairs)
    drawn = {name: samples(run, name) for name in table}
    result["samples"] = {name: answers[:SHOWN] for name, answers in drawn.items()}
    if run.config.data.test == "toy":
        for name, answers in drawn.items():
            result["models"][name]["true_reward"] = mean_and_error(
                [true_reward(sample["answer"], sample["prompt"]) for sample in answers]
            )
    if run.config.data.train == "toy" and "positive" in scorers(run):
        store = open_store(run.workdir / "annotations", verify=False)
        result["pieces"] = recovery((store[i] for i in range(len(store))), run.raw("train"))
    result["training"] = {
        stage: {"first": lines[0], "last": lines[-1]}
        for stage in ("positive", "negative", "student_dpo", "train")
        if (lines := read_metrics(run.workdir, stage))
    }
    result["example"] = example(run, 0)
    plain = as_plain(result)
    write_json(run.workdir / "evaluation.json", plain)
    write_report(run.workdir)
    run.say(show.example_text(plain["example"]))
    run.say(show.table(plain))
    run.say(f"{run.workdir / 'evaluation.json'}, {run.workdir / 'report.html'}")


def beta_of(run: Run, stage: str) -> float:
    """The beta that a stage was trained with; CTPD's for a model that was not trained on pairs."""
    for name in (stage, "train"):
        trained = read_json(run.workdir / name / "inputs.json") or {}
        if "beta" in trained.get("settings", {}):
            return trained["settings"]["beta"]
    return run.config.train.beta


def as_plain(value: Any) -> Any:
    """The value as JSON holds it; a figure that does not exist is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: as_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [as_plain(part) for part in value]
    if isinstance(value, np.generic):
        return as_plain(value.item())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean, its standard error, and the number of values."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "error": spread / len(values) ** 0.5, "count": len(values)}


def samples(run: Run, row: str) -> list[dict[str, str]]:
    """Answers of one model to the held-out prompts in turn; kept until the model or the settings change."""
    stage, model = rows(run)[row]
    settings = run.config.evaluate
    inputs = {
        "params": run.identity(stage, model),
        "data": run.data_identity("test"),
        "count": settings.samples,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": run.config.seed,
    }
    path = run.workdir / "evaluation" / "samples" / f"{row}.json"
    known = read_json(path)
    if known and canonical_json(known["inputs"]) == canonical_json(inputs):
        return known["samples"]
    raw = run.raw("test")
    prompts: dict[tuple[Message, ...], str] = {}  # each prompt once, in the order of the data
    for pair in run.pairs("test"):
        if not pair.dropped:
            prompts.setdefault(raw[pair.id].prompt, pair.id)
    asked = list(islice(cycle(prompts), settings.samples))
    answers = sample(run, model, run.params_of(stage, model), asked, settings.max_new_tokens, settings.temperature)
    drawn = [{"prompt": prompt[-1].content, "answer": answer} for prompt, answer in zip(asked, answers)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"inputs": inputs, "samples": drawn})
    return drawn


def sample(
    run: Run, model: Model, params: Params, prompts: Sequence[Sequence[Message]], max_new: int, temperature: float
) -> list[str]:
    """Draws one answer to each prompt, as text."""
    text, decoder = run.text(model), run.decoder(model)
    key = jax.random.key(run.config.seed)
    answers: list[str] = []
    for first in range(0, len(prompts), SAMPLED_TOGETHER):
        found = generate(
            decoder,
            params,
            [text.prompt(prompt).tolist() for prompt in prompts[first : first + SAMPLED_TOGETHER]],
            max_new_tokens=max_new,
            temperature=temperature,
            key=jax.random.fold_in(key, first),
            stop_ids=(text.end_of_turn, *decoder.eos_ids),
        )
        answers += [text.tokenizer.hf.decode(ids, skip_special_tokens=True) for ids in found]
    return answers


# ------------------------------------------------------------------------------------------------ single things


def example(run: Run, number: int) -> dict[str, Any]:
    """One training pair: the text of every span, both sides' tokens in it, and its weight where it was annotated."""
    config, pairs = run.config, run.pairs("train")
    if not 0 <= number < len(pairs):
        raise UserError(f"There is no pair {number}; the training data has {len(pairs)}, counted from 0.")
    pair, weights = pairs[number], None
    if (run.workdir / "annotations" / MANIFEST).exists():
        store = open_store(run.workdir / "annotations", {"data": run.data_identity("train")}, verify=False)
        weights = span_values([store[number]], config.weights, config.train, config.seed, first=number)[0][0]
    raw = run.raw("train")[pair.id]
    sides = {}
    for side, name in enumerate(SIDES):
        aligned, text = pair.response(side), (raw.chosen, raw.rejected)[side].encode("utf-8")
        spans = []
        for i in range(aligned.num_spans):
            spans.append(
                {
                    "text": text[aligned.bounds[i] : aligned.bounds[i + 1]].decode("utf-8", errors="replace"),
                    "teacher": show.pieces(run.text("teacher").tokenizer, aligned.teacher, i),
                    "student": show.pieces(run.text("student").tokenizer, aligned.student, i),
                    "weight": None if weights is None else float(weights[side].weights[i]),
                }
            )
        sides[name] = {"spans": spans, "truncated": pair.truncated[side]}
    return {"id": pair.id, "source": raw.source, "prompt": [dataclasses.asdict(m) for m in raw.prompt], **sides}


def inspect(run: Run, number: int) -> None:
    run.say(show.example_text(as_plain(example(run, number))))


def answer(run: Run, row: str, prompt: str, max_new: int, temperature: float) -> None:
    """Prints one model's answer."""
    table = rows(run)
    if row not in table:
        raise UserError(f"This run has no model {row!r}; choose one of {', '.join(table)}.")
    stage, model = table[row]
    print(sample(run, model, run.params_of(stage, model), [[Message("user", prompt)]], max_new, temperature)[0])


# ------------------------------------------------------------------------------------------------ export


def export(run: Run) -> None:
    """The trained student as a Hugging Face model folder."""
    stage, model = rows(run).get("ctpd", rows(run)["student_start"])
    directory = run.workdir / "export"
    inputs = {"params": run.identity(stage, model), "dtype": run.config.export.dtype}
    marker = run.workdir / "export.json"  # beside the folder, which holds a model and nothing else
    if read_json(marker) != inputs or not directory.is_dir():
        decoder, stop = run.decoder(model), run.text(model).end_of_turn
        # Who serves the model must stop where it was trained to stop.
        decoder = dataclasses.replace(decoder, eos_ids=tuple(dict.fromkeys((*decoder.eos_ids, stop))))
        save_hf(directory, decoder, run.params_of(stage, model), run.folder(model), dtype=run.config.export.dtype)
        write_json(marker, inputs)
    run.say(f"The student in Hugging Face format: {directory}")
