"""Export: the trained student as a Hugging Face model folder with a card, and its adapters where they are asked for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import ctpd_jax
from ctpd_jax.annotate.store import MANIFEST
from ctpd_jax.artifacts import Broken, check_files, checksums, kept, read_record, sha256_file, write_record
from ctpd_jax.errors import UserError
from ctpd_jax.job import lineage
from ctpd_jax.job.job import Job, by_first, result
from ctpd_jax.job.models import decoder_of, folder, text_of
from ctpd_jax.job.score import training_data
from ctpd_jax.job.table import DISTILLED, TRAINED, left_out, rows, trained_model, way_to
from ctpd_jax.models.hf import save_hf
from ctpd_jax.models.lora import save_peft
from ctpd_jax.report.card import model_card
from ctpd_jax.text.templates import told_source


def run(job: Job, stage: str) -> None:
    by_first("the export is written", lambda: write(job))


def write(job: Job) -> None:
    """Writes the folders, unless they are there and made from the same model, template, card and settings."""
    config, table = job.config, rows(job.config)
    row = next((name for name in DISTILLED if name in table), "student_start")
    stage = table[row]
    model = trained_model(config, stage)
    directory, adapters = job.workdir / "export", job.workdir / "adapters"

    # 1. What it is made from. The marker lies beside the folder, which holds a model and nothing else.
    text, card, marker = text_of(job, model), card_of(job, row), job.workdir / "export.json"
    inputs = {
        "params": lineage.identity(job, stage),
        "template": text.template.fingerprint,
        "card": hashlib.sha256(card.encode("utf-8", errors="replace")).hexdigest(),
        **config.export.to_dict(),
    }
    folders = [directory, adapters] if config.export.adapters else [directory]
    if not as_written(job, kept(marker, inputs), folders):
        files, decoder = lineage.Files(job, job.own), decoder_of(job, model)

        # 2. The model. Who serves it must stop where it was trained to stop, and ask as it was asked.
        stops = tuple(dict.fromkeys((*decoder.eos_ids, text.end_of_turn)))
        save_hf(
            directory,
            dataclasses.replace(decoder, eos_ids=stops),
            lineage.merged(files, config, stage),
            folder(job, model),
            dtype=config.export.dtype,
            chat_template=told_source(text.template) if text.template.kind == "chat" else None,
            card=card,
        )
        if not opens_as_it_is(directory):
            job.say(
                "AutoTokenizer of transformers 5 builds the tokenizer of this kind of model anew and splits text "
                f"otherwise than {directory / 'tokenizer.json'}: open it with PreTrainedTokenizerFast.from_pretrained."
            )

        # 3. The adapters, for the checkpoint that the user brought.
        if config.export.adapters:
            base = config[model].path or str(folder(job, model))
            save_peft(adapters, lineage.with_adapters(config, stage, decoder), files.adapters(stage), base)
        write_record(marker, {**inputs, "files": {one.name: checksums(one, files_of(one)) for one in folders}})
    job.say(f"The student in Hugging Face format: {directory}")
    if config.export.adapters:
        job.say(f"Its adapters, for PEFT: {adapters}")


def files_of(directory: Path) -> list[str]:
    """The files of an export that nobody is expected to edit: all but the card."""
    return sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != "README.md")


def as_written(job: Job, known: Mapping[str, Any] | None, folders: Sequence[Path]) -> bool:
    """Whether what was exported before still lies there, file by file: Hugging Face's format has no checksums."""
    if known is None:
        return False
    # What is missing or changed is made anew; a card may be somebody's own by now.
    card = folders[0] / "README.md"
    try:
        for one in (*folders, card):
            if not one.exists():
                raise Broken(f"{one} is missing")
        for folder in folders:
            check_files(folder, known.get("files", {}).get(folder.name, {}))  # an earlier version noted none
    except Broken as reason:
        job.say(f"export: {reason}; it is written anew.")
        return False
    if sha256_file(card) != known["card"]:
        job.say(f"export: {card} is not as it was written; it stays. Remove {folders[0]} to have all of it anew.")
    return True


def push(directory: Path, repo: str, private: bool, dry_run: bool, say: Callable[[str], None]) -> None:
    """Uploads an exported folder, card included, to the Hugging Face hub; the token is that of the environment.

    Raises:
        UserError: a name that is none, no right to write there, or a hub that does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        for path in files:
            say(f"{path.stat().st_size:>15,}  {path.relative_to(directory)}")
        if dry_run:
            say(f"{len(files)} files would go to {repo}; nothing was sent (--dry-run).")
            return
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Student distilled with ctpd-jax")
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {error}") from None
    except (HfHubHTTPError, OSError) as error:  # OSError: also no connection
        told = str(error).strip().splitlines()[0]
        raise UserError(f"--push {repo}: {told} Is HF_TOKEN set, and may it write there?") from None
    say(f"pushed: {done.commit_url}")


def opens_as_it_is(directory: Path) -> bool:
    """Whether AutoTokenizer of an exported folder gives the ids of its tokenizer.json, where splits tell."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").exists():
        return True
    # Numbers, contractions, white space, accents: where pre-tokenizers differ, they differ here.
    opened = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    core = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = ["It's 1234567 x.cat(a_b)\n\n\n  DON'T\t\tnaïve 你好 12.5%", " two  spaces\r\n", "Ünïcödé e\u0301 \u00a0x"]
    bare = {"add_special_tokens": False}
    return all(opened.encode(text, **bare) == core.encode(text, **bare).ids for text in texts)


def card_of(job: Job, row: str) -> str:
    """The model card of a row of the table. An evaluation is told only if it was of these very parameters."""
    config, stage = job.config, rows(job.config)[row]
    # What was measured of an earlier model is not told of this one.
    measured = read_record(job.workdir / "evaluation" / "samples" / f"{row}.json")
    fresh = measured is not None and measured["inputs"]["params"] == lineage.identity(job, stage)
    own, store = training_data(job, stage)
    annotated = read_record(store / MANIFEST)
    results = {name: result(job, name) for name in TRAINED if not left_out(config, name)}
    return model_card(
        own.config.to_dict(),
        row,
        updates={name: found["steps"] for name, found in results.items() if found is not None},
        says=way_to(config, row),
        pairs=annotated["data"]["count"] if annotated else None,
        template=text_of(job, trained_model(config, stage)).template.kind,
        evaluation=read_record(job.workdir / "evaluation.json") if fresh else None,
        versions={"ctpd-jax": ctpd_jax.__version__, "jax": jax.__version__},
    )
