"""Golden numbers for ctpd_jax.core, from the definitions, in float64 NumPy: python tests/golden/make_golden.py

Written without looking at the library: Python loops over spans and tokens, gradients derived by hand. Writes core.json
beside this file; tests/core/test_golden.py checks that the file is what this script makes and that the library agrees.
"""

from __future__ import annotations

import json
from math import ceil, exp, log, log1p, tanh
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("core.json")
BETA = 0.3
SFT_WEIGHT = 0.2


# ------------------------------------------------------------------------------------------------ inputs


def make_response(rng: np.random.RandomState, spans: int, left_over: int) -> dict[str, Any]:
    """A response of a few spans, the last one an end of turn (no bytes, one token on each side)."""
    response: dict[str, Any] = {}
    for side in ("student", "teacher"):
        counts = [int(n) for n in rng.randint(1, 4, size=spans - 1)] + [1]
        ids = [i for i, n in enumerate(counts) for _ in range(n)] + [-1] * left_over
        response[f"{side}_span_ids"] = ids
    students, teachers = len(response["student_span_ids"]), len(response["teacher_span_ids"])
    response["bytes"] = [int(n) for n in rng.randint(1, 9, size=spans - 1)] + [0]
    response["policy"] = draw(rng, students, -3.0, 0.0)
    response["start"] = draw(rng, students, -3.0, 0.0)
    response["reference"] = draw(rng, teachers, -2.0, 0.0)
    response["positive"] = draw(rng, teachers, -2.0, 0.0)
    response["negative"] = draw(rng, teachers, -2.0, 0.0)
    return response


def draw(rng: np.random.RandomState, size: Any, low: float, high: float) -> Any:
    return np.round(rng.uniform(low, high, size=size), 3).tolist()


# ------------------------------------------------------------------------------------------------ spans and weights


def sums(values: list[float], ids: list[int], spans: int) -> list[float]:
    return [sum(v for v, i in zip(values, ids) if i == span) for span in range(spans)]


def importance(response: dict[str, Any], mu: int, k: float, lower: float, upper: float) -> list[float]:
    spans, ids = len(response["bytes"]), response["teacher_span_ids"]
    pairs = zip(sums(response["positive"], ids, spans), sums(response["negative"], ids, spans))
    return [k * exp(mu * min(max(p - n, lower), upper)) for p, n in pairs]


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def rank(weights: list[float], lowest: float, highest: float) -> list[float]:
    """Equal weights share the mean of their ranks."""
    n = len(weights)
    result = []
    for w in weights:
        position = sum(v < w for v in weights) + (sum(v == w for v in weights) - 1) / 2
        result.append(lowest + (highest - lowest) * position / (n - 1) if n > 1 else lowest)
    return result


def binary(weights: list[float], percent: float) -> list[float]:
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    kept = set(order[: ceil(round(percent * len(weights) / 100, 6))])
    return [1.0 if i in kept else 0.0 for i in range(len(weights))]


def all_weights(response: dict[str, Any], mu: int) -> dict[str, list[float]]:
    w = importance(response, mu, 1.0, -0.5, 1.5)
    return {
        "none": w,
        "other bounds and k": importance(response, mu, 0.7, -1.0, 0.8),
        "threshold": [clip(x, 0.3, 1.6) for x in w],
        "scale": [0.3 + (clip(x, 0.2, 1.8) - 0.2) * 1.4 / 1.6 for x in w],
        "rank": rank(w, 0.6, 2.0),
        "binary 30": binary(w, 30),
        "binary 50": binary(w, 50),
        "mean_one": [x * len(w) / sum(w) for x in w],
        "agree": [x if x >= 1 else 0.0 for x in w],
        "uniform": [1.0] * len(w),
    }


# ------------------------------------------------------------------------------------------------ returns and losses


def token_form(
    response: dict[str, Any], weights: list[float], reference: str, span_logprob: str, normalize: str
) -> tuple[float, list[float]]:
    """The return of a response, by its definition, and its derivative by each of the policy's token log-probs."""
    spans = len(weights)
    policy_ids = response["student_span_ids"]
    reference_ids = response["teacher_span_ids"] if reference == "teacher" else policy_ids
    reference_values = {
        "teacher": response["reference"],
        "start": response["start"],
        "none": [0.0] * len(policy_ids),
    }[reference]
    size = {"none": 1, "span": spans, "byte": max(1, sum(response["bytes"]))}[normalize]
    total, slope = 0.0, [0.0] * len(policy_ids)
    for span in range(spans):
        mine = [t for t, i in enumerate(policy_ids) if i == span]
        theirs = [t for t, i in enumerate(reference_ids) if i == span]
        n, m = (len(mine), len(theirs)) if span_logprob == "mean" else (1, 1)
        policy_value = sum(response["policy"][t] for t in mine) / n
        reference_value = sum(reference_values[t] for t in theirs) / m
        total += weights[span] * (policy_value - reference_value) / size
        for t in mine:
            slope[t] = weights[span] / (n * size)
    return total, slope


def log_sigmoid(x: float) -> float:
    return -log1p(exp(-x)) if x > 0 else x - log1p(exp(x))


def link(chosen: float, rejected: float, loss: str, smoothing: float) -> tuple[float, float, float]:
    """The loss of a pair and its derivatives by the returns of chosen and rejected."""
    if loss == "apo":
        s_chosen, s_rejected = (exp(log_sigmoid(BETA * r)) for r in (chosen, rejected))
        slopes = -BETA * s_chosen * (1 - s_chosen), BETA * s_rejected * (1 - s_rejected)
        return 1 - s_chosen + s_rejected, *slopes
    if loss == "dpop":
        lost = max(0.0, -chosen)
        h = chosen - rejected - 50 * lost
        slope = -BETA * exp(log_sigmoid(-BETA * h))
        return -log_sigmoid(BETA * h), slope * (51 if lost else 1), -slope
    value, slope = margin_link(chosen - rejected, loss, smoothing)
    return value, slope, -slope


def margin_link(h: float, loss: str, smoothing: float) -> tuple[float, float]:
    """The loss of a pair and its derivative by the margin h."""
    s = exp(log_sigmoid(BETA * h))
    if loss == "robust":
        value = -(1 - smoothing) * log_sigmoid(BETA * h) + smoothing * log_sigmoid(-BETA * h)
        return value / (1 - 2 * smoothing), -BETA * ((1 - smoothing) * (1 - s) + smoothing * s) / (1 - 2 * smoothing)
    if loss == "sigmoid":
        value = -(1 - smoothing) * log_sigmoid(BETA * h) - smoothing * log_sigmoid(-BETA * h)
        return value, BETA * (smoothing * s - (1 - smoothing) * (1 - s))
    if loss == "ipo":
        return (h - 1 / (2 * BETA)) ** 2, 2 * (h - 1 / (2 * BETA))
    return max(0.0, 1 - BETA * h), -BETA if BETA * h < 1 else 0.0


def pair_loss(pair: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    kind = options["weights"]
    returns, slopes = {}, {}
    for side, mu in (("chosen", 1), ("rejected", -1)):
        weights = all_weights(pair[side], mu)[kind]
        names = ("reference", "span_logprob", "normalize")
        returns[side], slopes[side] = token_form(pair[side], weights, *(options[n] for n in names))
    h = returns["chosen"] - returns["rejected"]
    value, *by_return = link(returns["chosen"], returns["rejected"], options["loss"], options["label_smoothing"])
    gradients = {side: [slope * a for a in slopes[side]] for side, slope in zip(("chosen", "rejected"), by_return)}
    if options["sft"]:
        tokens = [t for t, i in enumerate(pair["chosen"]["student_span_ids"]) if i >= 0]
        value -= SFT_WEIGHT * sum(pair["chosen"]["policy"][t] for t in tokens) / len(tokens)
        for t in tokens:
            gradients["chosen"][t] -= SFT_WEIGHT / len(tokens)
    return {
        "loss": value,
        "chosen_reward": BETA * returns["chosen"],
        "rejected_reward": BETA * returns["rejected"],
        "lam": exp(log_sigmoid(-BETA * h)),
        "gradients": gradients,
    }


def option_table() -> list[dict[str, Any]]:
    """The default, and every option changed on its own; then every combination of the return's options."""
    default = {
        "weights": "none",
        "reference": "teacher",
        "span_logprob": "sum",
        "normalize": "none",
        "loss": "sigmoid",
        "label_smoothing": 0.0,
        "sft": False,
    }
    names = (
        "other bounds and k",
        "threshold",
        "scale",
        "rank",
        "binary 30",
        "binary 50",
        "uniform",
        "mean_one",
        "agree",
    )
    changed: list[dict[str, Any]] = [{}] + [{"weights": name} for name in names]
    changed += [{"loss": "ipo"}, {"loss": "hinge"}, {"label_smoothing": 0.1}, {"sft": True}]
    changed += [{"loss": "robust", "label_smoothing": 0.1}, {"loss": "dpop"}, {"loss": "apo"}]
    for reference in ("teacher", "start", "none"):
        for span_logprob in ("sum", "mean"):
            for normalize in ("none", "span", "byte"):
                changed.append({"reference": reference, "span_logprob": span_logprob, "normalize": normalize})
    return [default | change for change in changed]


# ------------------------------------------------------------------------------------------------ objectives beyond


def regression(response: dict[str, Any], tau: float, bound: float) -> dict[str, Any]:
    """Targets of the spans, the mean squared error over them, and its derivative by the policy's token log-probs."""
    spans, mine, theirs = len(response["bytes"]), response["student_span_ids"], response["teacher_span_ids"]
    start, policy = sums(response["start"], mine, spans), sums(response["policy"], mine, spans)
    aligned, before = sums(response["positive"], theirs, spans), sums(response["reference"], theirs, spans)
    targets = [s + tau * clip(p - r, -bound, bound) for s, p, r in zip(start, aligned, before)]
    errors = [p - t for p, t in zip(policy, targets)]
    slope = [2 * errors[i] / spans if i >= 0 else 0.0 for i in mine]
    return {"targets": targets, "loss": sum(e * e for e in errors) / spans, "gradient": slope}


def objectives(pairs: list[dict[str, Any]], tau: float, bound: float) -> dict[str, Any]:
    """What span regression makes of the pairs, and what labels and weights follow from margins."""
    margins = [-1.5, 0.0, 0.4, 3.0]
    labels = [1 - tau + tau / (1 + exp(-m)) for m in margins]
    return {
        "tau": tau,
        "clip": bound,
        "regression": [{side: regression(pair[side], tau, bound) for side in ("chosen", "rejected")} for pair in pairs],
        "margins": margins,
        "labels": labels,
        "weights": [x * len(labels) / sum(labels) for x in labels],
    }


# ------------------------------------------------------------------------------------------------ token log-probs


def logprob(hidden: list[float], unembedding: list[list[float]], target: int, softcap: float | None) -> float:
    logits = [sum(h * w for h, w in zip(hidden, row)) for row in unembedding]
    if softcap is not None:
        logits = [softcap * tanh(z / softcap) for z in logits]
    top = max(logits)
    return logits[target] - top - log(sum(exp(z - top) for z in logits))


def token_logprob_cases(rng: np.random.RandomState) -> dict[str, Any]:
    hidden, unembedding = draw(rng, (6, 5), -2, 2), draw(rng, (19, 5), -2, 2)
    targets = [int(t) for t in rng.randint(0, 19, size=6)]
    cases = [
        {"softcap": cap, "values": [logprob(h, unembedding, t, cap) for h, t in zip(hidden, targets)]}
        for cap in (None, 2.5)
    ]
    return {"hidden": hidden, "unembedding": unembedding, "targets": targets, "cases": cases}


# ------------------------------------------------------------------------------------------------ the file


def build() -> dict[str, Any]:
    rng = np.random.RandomState(2601)
    pairs = [
        {"chosen": make_response(rng, a, left), "rejected": make_response(rng, b, 0)}
        for a, b, left in ((6, 4, 2), (10, 7, 0), (1, 3, 0))
    ]
    spans = [
        {
            side: {
                "sums": sums(pair[side]["policy"], pair[side]["student_span_ids"], len(pair[side]["bytes"])),
                "weights": all_weights(pair[side], mu),
            }
            for side, mu in (("chosen", 1), ("rejected", -1))
        }
        for pair in pairs
    ]
    losses = [{"options": options, "pairs": [pair_loss(pair, options) for pair in pairs]} for options in option_table()]
    return {
        "beta": BETA,
        "sft_weight": SFT_WEIGHT,
        "token_logprobs": token_logprob_cases(rng),
        "pairs": pairs,
        "spans": spans,
        "losses": losses,
        "objectives": objectives(pairs, 0.7, 0.9),
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(build()) + "\n")
    print(f"wrote {PATH}")
