"""The model card of an export: README.md in Markdown, saying how the model was made.

Names and figures of a run are data: they stand in code spans, on one line, with nothing in them that could leave it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ctpd_jax.report import show

MAX_TEXT = 120  # characters of one name or setting
PAPER = "https://arxiv.org/abs/2601.11865"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# The stages on the way to the student, and what each of them makes.
STAGES = {
    "teacher_sft": "teacher, SFT on the chosen responses",
    "student_sft": "student, SFT on the chosen responses",
    "positive": "{positive_scorer}, leaning to the chosen responses",
    "negative": "{negative_scorer}, leaning to the rejected responses",
    "train": "student, CTPD",
}
_SOURCES = {
    "dpo": "the log-ratio of two models, trained with DPO on the pairs as they are and with their sides swapped",
    "sft": "the log-ratio of two models, trained on the chosen and on the rejected responses",
    "prompts": "the log-ratio of one model under two instructions, to answer well and to answer badly",
    "uniform": "none, every span counts alike",
    "random": "random numbers, a control",
}
_REFERENCES = {"teacher": "the teacher", "student": "the student's own start", "none": "none"}
_ROUNDED = {
    "float32": "",
    "bfloat16": "the teacher read with its parameters in bfloat16",
}
_SENSES = {
    "per_byte": "log-probability per byte of text",
    "vs_start": "implicit reward against the model's own start",
    "vs_teacher": "implicit reward against the teacher",
}


def model_card(
    config: Mapping[str, Any],
    row: str,
    updates: Mapping[str, int],
    pairs: int | None,
    template: str,
    evaluation: Mapping[str, Any] | None,
    versions: Mapping[str, str],
) -> str:
    """The card of a run's student.

    Args:
        config: the run's settings as a nested dict.
        row: "ctpd", or "student_start" where CTPD was left out.
        updates: stage -> the number of its updates, of the stages that were not left out.
        pairs: how many training pairs there were, if that is known.
        template: "chat" or "plain": how the student was asked.
        evaluation: what `evaluate` found for this very model; None: it was not evaluated.
        versions: package -> version.

    Returns:
        Markdown after a YAML front matter, as the Hugging Face hub reads it.
    """
    distilled = row == "ctpd"
    student, teacher = (_model(config, name) for name in ("student", "teacher"))
    if distilled:
        lead = (
            f"The student {student}, trained on preference pairs by cross-tokenizer preference distillation (CTPD, "
            f"[arXiv 2601.11865]({PAPER})): the teacher {teacher}, which cuts text into other tokens, gives every "
            "aligned span of a response a weight and a reference log-probability, and the student learns from those."
        )
    else:
        lead = f"The student {student} of a run in which preference distillation was left out."
    parts = [
        _front_matter(config, distilled),
        f"# {_base_name(config['student']['path'], 'student')}" + (" (CTPD)" if distilled else ""),
        lead,
        "## How it was made",
        _origins(config, distilled, student, teacher, pairs, template),
        _stages(config, updates, distilled),
        "## Evaluation",
        _evaluation(evaluation, row) if evaluation else "This model was not evaluated in the run that made it.",
        "## Use",
        _use(template),
        "## Versions",
        ", ".join(f"{name} {_code(version)}" for name, version in versions.items())
        + ". The licences of the student, of the teacher and of the data apply to this model.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------ text


def _code(value: Any) -> str:
    """Anything as a code span on one line, also inside of a table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(show.harmless(text).split()).replace("`", "'").replace("|", "¦")
    return f"`{text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + '…'}`" if text else "`(empty)`"


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not Path(path).expanduser().exists()


def _base_name(path: str, otherwise: str) -> str:
    """The last part of a hub id or of a folder's path: where it lay on the disk is nobody's business."""
    name = "".join(c for c in Path(path).name if c.isalnum() or c in "._- ")
    return name[:MAX_TEXT] or otherwise


def _model(config: Mapping[str, Any], which: str) -> str:
    path = config[which]["path"]
    return _code(path if _is_hub_id(path) else _base_name(path, which))


def _data(spec: str) -> str:
    remote = spec.startswith(("hf:", "tfds:"))
    return _code(spec if remote else Path(spec).name)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(head), *map(list, rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


# ------------------------------------------------------------------------------------------------ parts


def _front_matter(config: Mapping[str, Any], distilled: bool) -> str:
    """YAML; strings as JSON writes them, which is YAML too."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if _is_hub_id(config["student"]["path"]):
        lines.append(f"base_model: {json.dumps(config['student']['path'])}")
    dataset = config["data"]["train"].removeprefix("hf:").partition(":")[0]
    if config["data"]["train"].startswith("hf:") and _HUB_ID.fullmatch(dataset):
        lines += ["datasets:", f"- {json.dumps(dataset)}"]
    if distilled:
        lines += ["tags:", "- ctpd", "- preference-distillation"]
    return "\n".join([*lines, "---"])


def _origins(
    config: Mapping[str, Any], distilled: bool, student: str, teacher: str, pairs: int | None, template: str
) -> str:
    data, weights, train = config["data"], config["weights"], config["train"]
    count = "" if pairs is None else f", {pairs:,} pairs"
    lines = [
        f"student: {student}",
        f"teacher: {teacher}" if distilled else "",
        f"data: {_data(data['train'])}, split {_code(data['train_split'])}{count}; at most {data['max_prompt_tokens']} "
        f"tokens of a prompt and {data['max_response_tokens']} of a response, on both sides",
        f"prompts: by {'the chat template' if template == 'chat' else 'plain text, without a template'}",
        f"seed: {config['seed']}",
    ]
    if distilled:
        bounds = f"{weights['lower']:g} and {weights['upper']:g}"
        formula = f"mu {weights['mu']:g}, k {weights['k']:g}, exponents between {bounds}"
        scored = weights["source"] in ("dpo", "sft", "prompts")
        lines += [
            f"weights of the spans: {_SOURCES[weights['source']]}"
            + (f" ({formula}; transform {_code(weights['transform'])})" if scored else ""),
            f"reference: {_REFERENCES[train['reference']]}",
            f"spans: aligned at every {data['unit']} border that both tokenizers share; log-probabilities as "
            f"{'sums' if train['span_logprob'] == 'sum' else 'means'} over a span, normalized by "
            f"{_code(train['normalize'])}",
            _ROUNDED[config["annotate"]["teacher_weights"]],
        ]
    return "\n".join(f"- {line}" for line in lines if line)


def _stages(config: Mapping[str, Any], updates: Mapping[str, int], distilled: bool) -> str:
    """A row for each training stage on the way to the exported model."""
    rows = []
    for stage, what in STAGES.items():
        if stage not in updates or not (distilled or stage == "student_sft"):
            continue
        settings = config[stage]
        rank = settings["lora"]["rank"]
        pairwise = "beta" in settings and not (stage != "train" and config["weights"]["source"] == "sft")
        rows.append(
            (
                what.format_map(config["weights"]),
                f"{updates[stage]:,}",
                f"{settings['batch_size']}",
                f"{settings['lr']:g}",
                f"{settings['beta']:g}" if pairwise else "",
                _code(settings["loss"]) if pairwise else "",
                f"adapters, rank {rank}, alpha {settings['lora']['alpha']:g}" if rank else "all parameters",
            )
        )
    head = ("stage", "updates", "batch", "learning rate", "beta", "loss", "trained")
    return _table(head, rows) if rows else "No stage of this run trained it."


def _evaluation(evaluation: Mapping[str, Any], row: str) -> str:
    found = evaluation["models"]
    rows = []
    for name, figures in found.items():
        senses = figures.get("all") or {}
        cells = [*(show.share(senses.get(sense)) for sense in _SENSES), show.figure(figures.get("bits_per_byte"), 3)]
        rows.append((f"**{_code(name)}**" if name == row else _code(name), *cells))
    head = ("model", *(label for label in show.SENSES.values()), "bits per byte")
    senses = "; ".join(f"{show.SENSES[sense]}: {meaning}" for sense, meaning in _SENSES.items())
    longer = show.share((evaluation.get("longer_is_better") or {}).get("all"))
    return (
        f"How often the chosen response is preferred, % [95 % interval], on {_count(evaluation.get('pairs'))} held-out "
        f"pairs. This model is **{_code(row)}**.\n\n{_table(head, rows)}\n\nThe longer response is the chosen one in "
        f"{longer} %. What counts as preferred: {senses}."
    )


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else show.NONE


def _use(template: str) -> str:
    if template == "chat":
        ask = (
            'messages = [{"role": "user", "content": "..."}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ")"
        )
    else:
        ask = 'inputs = tokenizer("...", return_tensors="pt")  # it was trained on plain text, see above'
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # of this file\n'
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        f"{ask}\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))\n"
        "```\n\n"
        "In JAX: `config, params = ctpd_jax.load_hf(folder)`."
    )
