"""The model card of an export: README.md in Markdown, saying how the model was made.

Names and figures of a run are data: they stand in code spans, on one line, with nothing in them that could leave it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ctpd_jax.report import format as wording
from ctpd_jax.report.format import TEMPLATES, harmless

MAX_TEXT = 120  # characters of one name or setting
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    config: Mapping[str, Any],
    row: str,
    updates: Mapping[str, int],
    says: Mapping[str, str],
    pairs: int | None,
    template: str,
    evaluation: Mapping[str, Any] | None,
    versions: Mapping[str, str],
) -> str:
    """Return the card of a run's student: Markdown after a YAML front matter, as the Hugging Face hub reads it.

    Args:
        config: the run's settings as a nested dict.
        row: "ctpd", "ctpd_proposed", or "student_start" where CTPD was left out.
        updates: stage -> the number of its updates, of the stages that were not left out.
        says: stage -> what it makes, in words, of the stages on the way to this model.
        pairs: how many training pairs there were, if that is known.
        template: "chat" or "plain": how the student was asked.
        evaluation: what `evaluate` found for this very model; None: it was not evaluated.
        versions: package -> version.
    """
    # 1. What the hub reads. Only names that can be found there are told: no folders of this machine.
    distilled = row != "student_start"
    train, student = config["data"]["train"], config["student"]["path"]
    dataset = train.removeprefix("hf:").partition(":")[0]
    front_matter = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=student if _is_hub_id(student) else None,
        datasets=[dataset] if train.startswith("hf:") and _HUB_ID.fullmatch(dataset) else None,
        tags=["ctpd", "preference-distillation"] if distilled else None,
    )
    # 2. What people read.
    return TEMPLATES.get_template("card.md.jinja").render(
        front_matter=front_matter.to_yaml(),
        title=_base_name(student, "student"),
        student=_model(student, "student"),
        teacher=_model(config["teacher"]["path"], "teacher"),
        data=code(train if train.startswith(("hf:", "tfds:")) else Path(train).name),
        pairs="" if pairs is None else f", {pairs:,} pairs",
        stages=_stages(config, updates, says),
        config=config,
        row=row,
        distilled=distilled,
        plain=template != "chat",
        evaluation=evaluation,
        versions=versions,
        code=code,
        format=wording,
    )


def code(value: Any) -> str:
    """Return anything as a code span on one line, also inside of a table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(harmless(text).split()).replace("`", "'").replace("|", "¦")
    return f"`{text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + '…'}`" if text else "`(empty)`"


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not Path(path).expanduser().exists()


def _base_name(path: str, otherwise: str) -> str:
    """Return the last part of a hub id or of a folder's path: where it lay on the disk is nobody's business."""
    name = "".join(c for c in Path(path).name if c.isalnum() or c in "._- ")
    return name[:MAX_TEXT] or otherwise


def _model(path: str, which: str) -> str:
    return code(path if _is_hub_id(path) else _base_name(path, which))


def _stages(config: Mapping[str, Any], updates: Mapping[str, int], says: Mapping[str, str]) -> list[list[str]]:
    """Return the cells of a row for each training stage on the way to the exported model."""
    rows = []
    for stage, what in says.items():
        if stage not in updates:
            continue
        settings = config[stage]
        cells = [what, f"{updates[stage]:,}", str(settings["batch_size"])]
        cells.append(f"{settings['lr']:g}")
        # A contrastive pair that was trained on responses has neither beta nor loss, though its settings do.
        responses = stage in ("positive", "negative") and config["weights"]["source"] == "sft"
        pairwise = "beta" in settings and not responses
        cells += [f"{settings['beta']:g}", code(settings["loss"])] if pairwise else ["", ""]
        lora = settings["lora"]
        adapted = f"adapters, rank {lora['rank']}, alpha {lora['alpha']:g}"
        adapted += ", over matrices rounded to int8" if lora["base"] == "int8" else ""
        rows.append([*cells, adapted if lora["rank"] else "all parameters"])
    return rows
