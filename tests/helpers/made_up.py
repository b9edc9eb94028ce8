"""A made-up run: what assess.evaluate, the metric log and the data stage write, in small."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def accuracy(value: float, count: int = 200) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - 0.07), "high": min(1.0, value + 0.06), "count": count}


def senses(per_byte: Any, vs_start: Any = None, vs_teacher: Any = None) -> dict[str, Any]:
    return {"per_byte": per_byte, "vs_start": vs_start, "vs_teacher": vs_teacher}


def row(value: float, student: bool = True, start: bool = False) -> dict[str, Any]:
    moved = student and not start
    return {
        subset: senses(
            accuracy(value, count),
            accuracy(value + 0.05, count) if moved else None,
            accuracy(value - 0.1, count) if student else None,
        )
        for subset, count in (("all", 200), ("length_matched", 43))
    } | {
        "margin_vs_start": 0.734 if moved else None,
        "lambda": {"mean": 0.482, "below_0.05": 0.31, "above_0.95": 0.275} if student else None,
        "bits_per_byte": 1.4142,
    }


def span(text: str, teacher: list[str], student: list[str], weight: float | None = 1.0) -> dict[str, Any]:
    return {"text": text, "teacher": teacher, "student": student, "weight": weight, "logps": {"reference": -1.5}}


def example(weighted: bool = True) -> dict[str, Any]:
    chosen = [
        span("Green leaves", [" Green", " leaves"], ["Gre", "en le", "aves"], 1.31),
        span(", 不客气", [",", " 不客气"], [", ", "<0xE4><0xB8>", "<0x8D>客", "气"], 4.2),
        span(" 👨‍👩‍👧", [" 👨‍👩‍👧"], [" 👨", "\u200d", "👩", "\u200d", "👧"], 0.8),
        span("\n\tvoilà", ["\n\t", "voilà"], ["\n", "\tvoi", "là"], 1.0),
        span("", ["<end_of_turn>"], ["<|im_end|>"], 0.95),
    ]
    rejected = [
        span("<script>alert(1)</script>", ["<script>", "alert(1)", "</script>"], ["<script>alert(1)</script>"], 0.25),
        span("\x1b[31m who & 'cares' \"", ["\x1b[31m", " who & 'cares' \""], ["\x1b", "[31m who & 'cares' \""], 1.6),
        *[span(f" word{i}", [f" word{i}"], [f" word{i}"], 0.22 + 0.03 * i) for i in range(48)],
    ]
    sides = {"chosen": chosen, "rejected": rejected}
    if not weighted:
        for one in chosen + rejected:
            one["weight"] = None
    return {
        "id": "pair <7>",
        "source": "train.jsonl:17",
        "prompt": [{"role": "user", "content": "请谈谈 tea & <b>bread</b>."}],
        "read": {"teacher": ["<bos>", "请谈谈"], "student": ["<|im_start|>", "user"]},
        **{name: {"spans": spans, "truncated": name == "rejected"} for name, spans in sides.items()},
    }


def evaluation() -> dict[str, Any]:
    answers = {
        "student_start": "a of the",
        "student_dpo": "thank you",
        "ctpd": "thank you, 不客气 <img src=x>",
        "teacher": "",
    }
    return {
        "models": {
            "student_start": row(0.55, start=True),
            "student_dpo": row(0.66),
            "ctpd": row(0.78),
            "teacher": row(0.6, student=False),
            "teacher_dpo": row(0.85, student=False),
        },
        "longer_is_better": {"all": accuracy(0.71), "length_matched": accuracy(0.5, 43)},
        "pairs": 200,
        "data": {
            "in_train": {"pairs": 0.12, "prompts": 0.345},
            "one_side_cut": 85,
            "both_cut": 21,
            "end_of_turn": "end of turn on neither side",
        },
        "samples": {
            name: [{"prompt": p, "answer": text} for p in ("Explain bread to a child.", "请谈谈 tea.")]
            + [{"prompt": "请谈谈 tea.", "answer": f"another one of {name}"}]
            for name, text in answers.items()
        },
        "example": example(),
    }


def metrics() -> list[dict[str, Any]]:
    lines = []
    for stage, steps in (("teacher_sft", 30), ("train", 600)):
        for step in range(steps):
            t = step / steps
            line: dict[str, Any] = {
                "stage": stage,
                "step": step,
                "time": 1.0,
                "loss": 0.69 * math.exp(-t) + 0.05 * math.sin(step),
                "grad_norm": 3 * math.exp(-2 * t) + 0.3 * math.cos(3 * step),
                "tokens_per_second": 200.0 if step == 0 else 15200.0 + 400 * math.sin(step),
            }
            if stage == "train":
                line |= {
                    "rewards/chosen": t - 2,
                    "rewards/rejected": -2 * t - 2,
                    "rewards/margins": 3 * t + 0.3 * math.sin(step),
                    "rewards/margin_from_start": 2.5 * t,
                    "rewards/accuracies": 0.5 + 0.4 * t + 0.1 * math.sin(step),
                    "lambda/mean": 0.5 - 0.2 * t,
                    "lambda/below_low": 0.2 + 0.1 * t,
                    "lambda/above_high": None if step == 3 else 0.3 - 0.2 * t,
                }
            lines.append(line)
    return lines


def write_run(workdir: Path) -> None:
    """All files of the made-up run."""
    workdir.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "evaluation.json": evaluation(),
        "config.json": {
            "seed": 0,
            "data": {"train": "<i>own</i>"},
            "weights": {"k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5},
        },
        "data_train.json": {"source": "a & b.jsonl", "responses cut": 3, "pairs": 1234, "first": {"x": ["y:7"]}},
        "data_test.json": {"source": "test.jsonl", "pairs": 200},
    }
    for name, value in files.items():
        (workdir / name).write_text(json.dumps(value), "utf-8")
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()), "utf-8")
