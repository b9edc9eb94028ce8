"""`ctpd generate`, and the answers in an evaluation: a model of the run, or any model folder, is asked."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from ctpd_jax.artifacts import write_json
from ctpd_jax.errors import UserError
from ctpd_jax.job import lineage
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of, dtype_of, text_of
from ctpd_jax.job.table import reading_dtype, rows, trained_model
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params
from ctpd_jax.models.hf import load_hf, model_directory
from ctpd_jax.models.hf.config import read_config
from ctpd_jax.models.lora import join
from ctpd_jax.models.sampling import cut_at_stop, generate
from ctpd_jax.processes import preempt
from ctpd_jax.schema import Message
from ctpd_jax.text.preferences import load_prompts
from ctpd_jax.text.prompts import TextModel, load_text_model
from ctpd_jax.text.tokens import encode
from ctpd_jax.train.metrics import Progress

SAMPLED_TOGETHER = 64  # prompts in one batch: what the cache of keys and values has room for


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; see `generate`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()  # an answer is cut before the first of these texts
    seed: int = 0


def answer(job: Job, known: argparse.Namespace) -> None:
    """Answers with one of the run's models."""
    # What the command line asks for, and its prompts, before anything large is opened.
    table, sampling = rows(job.config), sampling_of(known, job.config.seed)
    if known.model not in table:
        raise UserError(f"This run has no model {known.model!r}; choose one of {', '.join(table)}.")
    prompts, stage = prompts_of(known), table[known.model]
    decoder, params = reading_model(job, stage, job.mesh)
    text, dtype = text_of(job, trained_model(job.config, stage)), dtype_of(job.config, job.mesh)
    _answer(known, sampling, prompts, text, decoder, params, f"{job.workdir.name}/{known.model}", dtype)


def answer_from_folder(known: argparse.Namespace) -> None:
    """Answers with a model in Hugging Face format, a folder or a hub id."""
    sampling, folder = sampling_of(known, seed=0), model_directory(known.folder)
    read_config(folder)  # says what the folder is, before anything of it is opened
    prompts, text = prompts_of(known), load_text_model(str(folder))
    _answer(known, sampling, prompts, text, *load_hf(folder), Path(known.folder).name)


def sampling_of(known: argparse.Namespace, seed: int) -> Sampling:
    """What the command line asks for; `seed` where it names none.

    Raises:
        UserError: no such seed, both prompts and a file of them, neither, or a file and no place for the answers.
    """
    seed = seed if known.seed is None else known.seed
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie between 0 and 2^32 - 1, but is {seed}.")
    if (known.prompts is None) == (not known.prompt):
        raise UserError("give --prompt TEXT, or --prompts with a file of them.")
    if known.prompts is not None and known.out is None:
        raise UserError("give --out FILE.json, where the answers to --prompts go.")
    return Sampling(known.max_new_tokens, known.temperature, known.top_p, known.top_k, tuple(known.stop), seed)


def prompts_of(known: argparse.Namespace) -> list[tuple[Message, ...]]:
    """The prompts of the command line, or the distinct ones of the data set that it names.

    Raises:
        UserError: the data set holds none.
    """
    if known.prompts is None:
        return [(Message("user", prompt),) for prompt in known.prompt]
    found, report = load_prompts(known.prompts, known.split, known.limit)
    if not found:
        raise UserError(f"{known.prompts} holds no prompt ({report.reasons() or 'it is empty'}).")
    return found


def _answer(
    known: argparse.Namespace,
    sampling: Sampling,
    prompts: Sequence[Sequence[Message]],
    text: TextModel,
    decoder: DecoderConfig,
    params: Params,
    name: str,
    dtype: str | None = None,
) -> None:
    """Prints the answers, or writes those to a data set as AlpacaEval does and tells how long and how many were cut."""
    # 1. On the screen: the answer alone, or each of several under its prompt.
    asked = [prompt[-1].content if prompt else "" for prompt in prompts]
    if known.prompts is None:
        answers = sample(text, decoder, params, prompts, sampling, dtype)
        if len(asked) > 1:
            quoted = [textwrap.indent(said, "> ", lambda line: True) for said in asked]
            answers = [f"{said}\n{given}" for said, given in zip(quoted, answers)]
        print("\n\n".join(answers))
        return
    # 2. Into a file: a list of records.
    with Progress(len(prompts), "answers", unit="answer") as progress:
        answers = sample(text, decoder, params, prompts, sampling, dtype, progress.update)
    rows = [
        {"instruction": said, "output": given, "generator": name} for said, given in zip(asked, answers, strict=True)
    ]
    known.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(known.out, rows)
    # One that is as long as it may be was cut, but for the rare one that ends right there.
    lengths = [len(encode(text.tokenizer, given)) for given in answers]
    cut = sum(length >= sampling.max_new_tokens - 1 for length in lengths) / len(lengths)
    characters = sum(map(len, answers)) / len(answers)
    print(f"{len(rows)} answers of {characters:.0f} characters on average, {100 * cut:.1f} % cut: {known.out}")


def reading_model(job: Job, stage: str, mesh: Mesh) -> tuple[DecoderConfig, Params]:
    """The model that a stage left, in the dtype that it is scored with; adapters stay beside a bfloat16 base."""
    files, model = lineage.Files(job, mesh), trained_model(job.config, stage)
    dtype = reading_dtype(job.config, model)
    if dtype == "float32":
        return decoder_of(job, model), lineage.merged(files, job.config, stage)
    origin, stacked = lineage.finished(files, job.config, (stage,), dtype)
    return origin.decoder, join(origin.params, jax.tree.map(lambda leaf: leaf[0], stacked))


def sample(
    text: TextModel,
    decoder: DecoderConfig,
    params: Params,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    dtype: str | None = None,
    done: Callable[[int], object] = lambda answers: None,
) -> list[str]:
    """Draws one answer to each prompt, as text; `done` is told of finished ones.

    `dtype` is that of the products, by default the parameters' own.
    """
    # Each batch draws with a key of its own: the number of prompts before it does not matter.
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
        done(len(found))
    return answers
