"""The stages that look at what was trained, evaluate and export; and the commands inspect and generate."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ctpd_jax
from ctpd_jax import preempt
from ctpd_jax.annotate.coefficients import span_values
from ctpd_jax.annotate.store import MANIFEST, open_store
from ctpd_jax.errors import UserError
from ctpd_jax.evaluate.preferences import compare
from ctpd_jax.files import canonical_json, write_json
from ctpd_jax.measure import Measured, score_column
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.hf import load_hf, model_directory, save_hf
from ctpd_jax.models.hf.config import read_config
from ctpd_jax.models.lora import join, save_peft
from ctpd_jax.models.sampling import cut_at_stop, generate
from ctpd_jax.report import show
from ctpd_jax.report.card import model_card
from ctpd_jax.report.html import write_report
from ctpd_jax.run import Run, dtype_of
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES, Message, Model
from ctpd_jax.settings import TRAINED
from ctpd_jax.sharding import first_process
from ctpd_jax.stages import scorers
from ctpd_jax.text.prompts import TextModel, load_text_model
from ctpd_jax.text.templates import told_source
from ctpd_jax.toy.recovery import recovery
from ctpd_jax.toy.world import true_reward
from ctpd_jax.train.metrics import read_metrics
from ctpd_jax.train.step import Params
from ctpd_jax.workdir import read_json

STARTS = {"student_dpo": "student_start", "ctpd": "student_start", "teacher_dpo": "teacher"}
SAMPLED_TOGETHER = 64  # prompts in one batch: what the cache of keys and values has room for
SHOWN = 6  # answers of each model in the report; the others are in evaluation/samples/


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn; see `generate`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()  # an answer is cut before the first of these texts
    seed: int = 0


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
    columns = {name: score_column(run, "test", name, stage, model) for name, (stage, model) in rows(run).items()}
    with preempt.apart("the evaluation is written"):
        if first_process():
            write_evaluation(run.here, columns)


def write_evaluation(run: Run, columns: Mapping[str, Measured]) -> None:
    """What every model made of the held-out pairs -> evaluation.json, report.html, and the table."""
    pairs, table = run.pairs("test"), rows(run)
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
    cuts = [sum(pair.truncated) for pair in pairs]
    result["data"] = {
        "in_train": run.overlap,
        "one_side_cut": cuts.count(1),
        "both_cut": cuts.count(2),
        "end_of_turn": run.limits.where_one_is_cut,
    }
    drawn = {name: samples(run, name) for name in table}
    result["samples"] = {name: answers[:SHOWN] for name, answers in drawn.items()}
    if run.config.data.test == "toy":
        for name, answers in drawn.items():
            if rewards := [true_reward(sample["answer"], sample["prompt"]) for sample in answers]:
                result["models"][name]["true_reward"] = mean_and_error(rewards)
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
        "weights": run.reading_dtype(model),
        "compute": dtype_of(run.config, run.mesh),
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
    sampling = Sampling(settings.max_new_tokens, settings.temperature, seed=run.config.seed)
    decoder, params = reading_model(run, stage, model)
    answers = sample(run.text(model), decoder, params, asked, sampling, dtype_of(run.config, run.mesh))
    drawn = [{"prompt": prompt[-1].content, "answer": answer} for prompt, answer in zip(asked, answers)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"inputs": inputs, "samples": drawn})
    return drawn


def reading_model(run: Run, stage: str, model: Model) -> tuple[DecoderConfig, Params]:
    """The model that a stage left as `score_column` reads it: adapters stay beside a bfloat16 base."""
    dtype = run.reading_dtype(model)
    if dtype == "bfloat16" and (run.left_out(stage) or stage == f"{model}_sft"):
        return run.start(model, dtype)
    if dtype == "bfloat16" and run.trained_decoder(stage, model).lora is not None:
        params = join(run.base(stage, model, dtype), run.adapters(stage, model))
        return run.running_decoder(stage, model, dtype), params
    return run.decoder(model), run.params_of(stage, model, dtype)


def sample(
    text: TextModel,
    decoder: DecoderConfig,
    params: Params,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    dtype: str | None = None,
) -> list[str]:
    """Draws one answer to each prompt, as text; `dtype` is that of the products, by default the parameters' own."""
    key = jax.random.key(sampling.seed)

    def spell(ids: list[int]) -> str:
        return text.tokenizer.hf.decode(ids, skip_special_tokens=True)

    answers: list[str] = []
    for first in range(0, len(prompts), SAMPLED_TOGETHER):
        preempt.check("the answers of the models before are kept")
        found = generate(
            decoder,
            params,
            [text.prompt(prompt).tolist() for prompt in prompts[first : first + SAMPLED_TOGETHER]],
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_p,
            key=jax.random.fold_in(key, first),
            stop_ids=(text.end_of_turn, *decoder.eos_ids),
            top_k=sampling.top_k,
            stop_strings=sampling.stop,
            decode=spell if sampling.stop else None,
            compute_dtype=dtype,
        )
        answers += [cut_at_stop(spell(ids), sampling.stop) for ids in found]
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


def sampling_of(arguments: argparse.Namespace, seed: int) -> Sampling:
    """What the command line asks for; `seed` where it names none."""
    seed = seed if arguments.seed is None else arguments.seed
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie between 0 and 2^32 - 1, but is {seed}.")
    return Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.top_k, tuple(arguments.stop), seed
    )


def answer(run: Run, row: str, prompts: Sequence[str], sampling: Sampling) -> None:
    """Prints the answers of one of the run's models."""
    table = rows(run)
    if row not in table:
        raise UserError(f"This run has no model {row!r}; choose one of {', '.join(table)}.")
    stage, model = table[row]
    decoder, params = reading_model(run, stage, model)
    _print_answers(run.text(model), decoder, params, prompts, sampling, dtype_of(run.config, run.mesh))


def answer_from_folder(path_or_repo: str, prompts: Sequence[str], sampling: Sampling) -> None:
    """Prints the answers of a model in Hugging Face format, a folder or a hub id."""
    folder = model_directory(path_or_repo)
    read_config(folder)  # says what the folder is, before anything of it is opened
    text = load_text_model(str(folder))
    _print_answers(text, *load_hf(folder), prompts, sampling)


def _print_answers(
    text: TextModel,
    decoder: DecoderConfig,
    params: Params,
    prompts: Sequence[str],
    sampling: Sampling,
    dtype: str | None = None,
) -> None:
    """The answer alone, or each of several under its prompt."""
    answers = sample(text, decoder, params, [[Message("user", prompt)] for prompt in prompts], sampling, dtype)
    if len(prompts) == 1:
        print(answers[0])
        return
    asked = [textwrap.indent(prompt, "> ", lambda line: True) for prompt in prompts]
    print("\n\n".join(f"{prompt}\n{answer}" for prompt, answer in zip(asked, answers)))


# ------------------------------------------------------------------------------------------------ export


def export(run: Run) -> None:
    """The trained student as a Hugging Face model folder, with a card; and its adapters where they are asked for."""
    with preempt.apart("the export is written"):
        if first_process():
            write_export(run.here)


def write_export(run: Run) -> None:
    row = "ctpd" if "ctpd" in rows(run) else "student_start"
    stage, model = rows(run)[row]
    directory, adapters = run.workdir / "export", run.workdir / "adapters"
    text = run.text(model)
    card = card_of(run, row)
    inputs = {
        "params": run.identity(stage, model),
        "template": text.template.fingerprint,
        "card": hashlib.sha256(card.encode("utf-8", errors="replace")).hexdigest(),
        **run.config.export.to_dict(),
    }
    marker = run.workdir / "export.json"  # beside the folder, which holds a model and nothing else
    gone = run.config.export.adapters and not adapters.is_dir()
    if read_json(marker) != inputs or not directory.is_dir() or gone:
        decoder = run.decoder(model)
        # Who serves the model must stop where it was trained to stop, and ask as it was asked.
        decoder = dataclasses.replace(decoder, eos_ids=tuple(dict.fromkeys((*decoder.eos_ids, text.end_of_turn))))
        save_hf(
            directory,
            decoder,
            run.params_of(stage, model),
            run.folder(model),
            dtype=run.config.export.dtype,
            chat_template=told_source(text.template) if text.template.kind == "chat" else None,
            card=card,
        )
        if not _opens_as_it_is(directory):
            run.say(
                "AutoTokenizer of transformers 5 builds the tokenizer of this kind of model anew and splits text "
                f"otherwise than {directory / 'tokenizer.json'}: open it with PreTrainedTokenizerFast.from_pretrained."
            )
        if run.config.export.adapters:
            base = run.config[model].path or str(run.folder(model))
            save_peft(adapters, run.trained_decoder(stage, model), run.adapters(stage, model), base)
        write_json(marker, inputs)
    run.say(f"The student in Hugging Face format: {directory}")
    if run.config.export.adapters:
        run.say(f"Its adapters, for PEFT: {adapters}")


def _opens_as_it_is(directory: Path) -> bool:
    """Whether AutoTokenizer of an exported folder gives the ids of its tokenizer.json, where splits tell."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").exists():
        return True
    opened = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    core = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = ["It's 1234567 x.cat(a_b)\n\n\n  DON'T\t\tnaïve 你好 12.5%", " two  spaces\r\n", "Ünïcödé e\u0301 \u00a0x"]
    bare = {"add_special_tokens": False}
    return all(opened.encode(text, **bare) == core.encode(text, **bare).ids for text in texts)


def card_of(run: Run, row: str) -> str:
    """The model card of a row of the table. An evaluation is told only if it was of these very parameters."""
    stage, model = rows(run)[row]
    measured = read_json(run.workdir / "evaluation" / "samples" / f"{row}.json")
    fresh = measured is not None and measured["inputs"]["params"] == run.identity(stage, model)
    annotated = read_json(run.workdir / "annotations" / MANIFEST)
    results = {name: run.result(name) for name in TRAINED if not run.left_out(name)}
    return model_card(
        run.config.to_dict(),
        row,
        updates={name: result["steps"] for name, result in results.items() if result is not None},
        pairs=annotated["data"]["count"] if annotated else None,
        template=run.text(model).template.kind,
        evaluation=read_json(run.workdir / "evaluation.json") if fresh else None,
        versions={"ctpd-jax": ctpd_jax.__version__, "jax": jax.__version__},
    )
