"""CTPD in PyTorch as the method's public code trains it: what train_step.py compares with, and starts by itself.

    python torch_ctpd.py INPUT.json      # where torch and transformers are; then a line of JSON for every answer:
    {"run": "update", "teacher": true, "micro_batch": 2}
    {"run": "epoch", "micro_batch": 2}

An update: pairs right-padded to the longest of their micro-batch, chosen and rejected responses in one forward pass,
log-softmax over all positions, sums over aligned spans, and for the reference either the teacher's forward pass in
every step or numbers of before. An epoch: two contrastive teachers read all pairs for the weights of their spans, then
all updates with the teacher in every step.

float32 on the CPU's cores, with what torch offers for that: scaled_dot_product_attention, the fused AdamW, no second
copy of the logits to shift them. Pairs of about equal length share a micro-batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Nothing but the standard library here: this file runs where ctpd_jax is not installed, and is imported without torch.

CHOSEN, REJECTED = 0, 1


def peak_gb() -> float:
    """The most memory that this process has held so far; NaN where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def serve(runs: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers every line {"run": NAME, ...} on standard input by a line; its seconds and the peak memory are added."""
    # What libraries print must not lie between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        run = runs[asked.pop("run")]
        start = time.perf_counter()
        found = run(**asked)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_gb": peak_gb(), **found}), file=answers, flush=True)


# ------------------------------------------------------------------------------------------------ batches


def size_of(pair: dict[str, Any], model: str) -> int:
    """Tokens of its longer row."""
    return len(pair["prompts"][model]) + max(len(response[model]) for response in pair["responses"])


def micro_batches(pairs: Sequence[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    ordered = sorted(pairs, key=lambda pair: size_of(pair, "student"))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def padding_of(parts: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Share of the student's tokens that is padding."""
    used = sum(
        2 * len(pair["prompts"]["student"]) + sum(len(response["student"]) for response in pair["responses"])
        for part in parts
        for pair in part
    )
    return 1 - used / sum(2 * len(part) * max(size_of(pair, "student") for pair in part) for part in parts)


def sided(pairs: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """All chosen responses, then all rejected ones, each with its side."""
    return [(side, pair["responses"][side]) for side in (CHOSEN, REJECTED) for pair in pairs]


def responses_of(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [response for _, response in sided(pairs)]


def padded(rows: Sequence[Sequence[float]]) -> Any:
    """float32 [rows, longest], 0 behind each."""
    import torch

    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in rows], batch_first=True)


def span_logps(model: Any, pairs: Sequence[dict[str, Any]], name: str) -> Any:
    """Log-probabilities [2B, S] of the spans of all chosen responses, then of all rejected ones, under a model."""
    import torch

    # 1. Rows of prompt and response; at the place of every token the span of the next one, which it predicts.
    responses, width = responses_of(pairs), max(size_of(pair, name) for pair in pairs)
    spans = max(response[f"{name}_spans"][-1] for response in responses) + 1
    tokens = torch.zeros(len(responses), width, dtype=torch.long)
    places = torch.full(tokens.shape, spans)  # in no span
    for row, response in enumerate(responses):
        prompt = pairs[row % len(pairs)]["prompts"][name]
        ids = prompt + response[name]
        tokens[row, : len(ids)] = torch.tensor(ids)
        places[row, len(prompt) - 1 : len(ids) - 1] = torch.tensor(response[f"{name}_spans"])
    # 2. No mask: what pads stands to the right, where causal attention does not look, and attention is faster so.
    logits = model(input_ids=tokens, use_cache=False).logits
    # 3. Targets are shifted rather than logits, of which that would make another copy.
    logps = torch.log_softmax(logits, -1).gather(2, tokens.roll(-1, 1)[..., None])[..., 0]
    return logps.new_zeros(len(responses), spans + 1).scatter_add(1, places, logps)[:, :-1]


# ------------------------------------------------------------------------------------------------ training


def load(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


class Trainer:
    """A student and its optimizer; the teacher is loaded when it is first needed."""

    def __init__(self, given: dict[str, Any]) -> None:
        import torch

        self.given, self.pairs, self.teacher = given, given["pairs"], None
        self.student = load(given["student"])
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=given["lr"], weight_decay=given["weight_decay"], fused=True
        )

    def update(self, places: Sequence[int], teacher: bool, micro_batch: int) -> dict[str, Any]:
        """One update on some of the pairs."""
        import torch

        if teacher and self.teacher is None:
            self.teacher = load(self.given["teacher"])
        parts, total = micro_batches([self.pairs[place] for place in places], micro_batch), 0.0
        for part in parts:
            responses = responses_of(part)
            if teacher:
                with torch.no_grad():
                    reference = span_logps(self.teacher, part, "teacher")
            else:
                reference = padded([response["reference"] for response in responses])
            policy = span_logps(self.student, part, "student")
            weights = padded([response["weights"] for response in responses])
            chosen, rejected = (weights * (policy - reference)).sum(1).chunk(2)
            losses = -torch.nn.functional.logsigmoid(self.given["beta"] * (chosen - rejected))
            loss = losses.sum() / len(places)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.given["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": total, "padding": padding_of(parts)}


def weigh(given: dict[str, Any], micro_batch: int) -> None:
    """Writes the weights of all spans, from what two teachers make of them."""
    import torch

    parts = micro_batches(given["pairs"], micro_batch)
    logps: list[list[Any]] = []
    for _ in ("positive", "negative"):
        teacher, found = load(given["teacher"]), []
        with torch.inference_mode():
            for part in parts:
                found += span_logps(teacher, part, "teacher")
        logps.append(found)
        del teacher
    # Rows come in that order: of every micro-batch the chosen responses first.
    rows = [each for part in parts for each in sided(part)]
    lower, upper = given["bounds"]
    for (side, response), positive, negative in zip(rows, *logps, strict=True):
        ratio = (positive - negative)[: response["teacher_spans"][-1] + 1].clamp(lower, upper)
        response["weights"] = (ratio if side == CHOSEN else -ratio).exp().tolist()


def main() -> None:
    import torch
    import transformers

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores or 1)
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    trainers: list[Trainer] = []

    def trainer() -> Trainer:
        if not trainers:
            trainers.append(Trainer(given))
        return trainers[0]

    def update(teacher: bool, micro_batch: int) -> dict[str, Any]:
        return trainer().update(given["updates"][0], teacher, micro_batch) | {"versions": versions}

    def epoch(micro_batch: int) -> dict[str, Any]:
        start = time.perf_counter()
        weigh(given, micro_batch)
        weighed = time.perf_counter()
        found = [trainer().update(places, True, micro_batch) for places in given["updates"]]
        trained = time.perf_counter()
        padding = sum(each["padding"] for each in found) / len(found)
        parts = {"annotation": weighed - start, "training": trained - weighed}
        return {"loss": found[0]["loss"], "padding": padding, "versions": versions, **parts}

    serve({"update": update, "epoch": epoch})


if __name__ == "__main__":
    main()
