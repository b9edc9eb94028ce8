"""Golden numbers for ctpd_jax.core.baselines, in float64 NumPy: python tests/golden/make_baselines.py

Written from the papers' formulas without looking at the library: Python loops over positions, and gradients by central
differences. Writes baselines.json beside this file; tests/core/test_baselines.py checks that the file is what this
script makes and that the library agrees.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("baselines.json")
STEP = 1e-5


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def descending(z: np.ndarray, size: int) -> np.ndarray:
    p = np.sort(softmax(z))[::-1][:size]
    return np.concatenate([p, np.zeros(size - len(p))])


def slope(function: Callable[[np.ndarray], float], at: np.ndarray) -> list:
    """Central differences, entry by entry."""
    out = np.zeros(at.shape)
    for place in np.ndindex(*at.shape):
        high, low = at.copy(), at.copy()
        high[place] += STEP
        low[place] -= STEP
        out[place] = (function(high) - function(low)) / (2 * STEP)
    return out.tolist()


# ------------------------------------------------------------------------------------------------ sorted probabilities


def uld(student: np.ndarray, teacher: np.ndarray) -> list[float]:
    size = max(student.shape[1], teacher.shape[1])
    return [float(np.abs(descending(s, size) - descending(t, size)).sum()) for s, t in zip(student, teacher)]


def uld_of_top(student: np.ndarray, teacher: np.ndarray, k: int) -> list[float]:
    found = []
    for s, t in zip(student, teacher):
        p, q = descending(s, k), descending(t, k)
        found.append(float(np.abs(p - q).sum() + abs((1 - p.sum()) - (1 - q.sum()))))
    return found


def cross_entropy(student: np.ndarray, teacher: np.ndarray, k: int) -> list[float]:
    pairs = [(descending(s, k), descending(t, k)) for s, t in zip(student, teacher)]
    return [float(-sum(b * np.log(max(a, 1e-10)) for a, b in zip(p, q))) for p, q in pairs]


def sinkhorn(student: np.ndarray, teacher: np.ndarray, k: int) -> float:
    x, y = [descending(s, k) for s in student], [descending(t, k) for t in teacher]
    cost = np.array([[np.abs(a - b).sum() for b in y] for a in x])
    plan = np.exp(-cost / 0.1)
    for _ in range(10):
        plan = plan / plan.sum(axis=1, keepdims=True) / len(x)
        plan = plan / plan.sum(axis=0, keepdims=True) / len(y)
    return float((plan * cost).sum())


def sorted_case(rng: np.random.RandomState, t: int, u: int, v1: int, v2: int, k: int) -> dict[str, Any]:
    student, teacher = np.round(rng.uniform(-3, 3, (t, v1)), 3), np.round(rng.uniform(-3, 3, (u, v2)), 3)
    functions: dict[str, Callable[[np.ndarray], Any]] = {
        "uld": lambda s: uld(s, teacher),
        "top": lambda s: uld_of_top(s, teacher, k),
        "cross_entropy": lambda s: cross_entropy(s, teacher, k),
        "sinkhorn": lambda s: sinkhorn(s, teacher, k),
    }
    case = {"student": student.tolist(), "teacher": teacher.tolist(), "k": k}
    for name, function in functions.items():
        case[name] = function(student)
        case[f"{name}_gradient"] = slope(lambda s, f=function: float(np.sum(f(s))), student)
    return case


# ------------------------------------------------------------------------------------------------ dual spaces


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def kl(truth: np.ndarray, other: np.ndarray, temperature: float) -> float:
    p, q = log_softmax(truth / temperature), log_softmax(other / temperature)
    return float(sum(np.exp(a) * (a - b) for a, b in zip(p, q)))


def dskd(a: dict[str, np.ndarray], fixed: dict[str, np.ndarray], temperature: float) -> dict[str, float]:
    """The three terms; what is a constant for the gradient is taken from `fixed`."""
    t, u, width = len(a["student_hidden"]), len(a["teacher_hidden"]), a["teacher_hidden"].shape[1]
    keys = np.concatenate([fixed["teacher_inputs"], fixed["teacher_targets"]], axis=1)
    keys = keys / keys.std()
    values = fixed["teacher_hidden"] / fixed["teacher_hidden"].std()
    values = values + fixed["teacher_targets"] / fixed["teacher_targets"].std()

    def attention(query_matrix: np.ndarray) -> np.ndarray:
        queries = np.concatenate([fixed["student_inputs"], fixed["student_targets"]], axis=1) @ query_matrix.T
        return queries @ keys.T / np.sqrt(2 * width)

    def guide(query_matrix: np.ndarray, matrix: np.ndarray) -> list[np.ndarray]:
        weights = [softmax(row) for row in attention(query_matrix)]
        return [fixed["student_head"] @ (w @ (values @ matrix.T)) for w in weights]

    own = [a["student_head"] @ h for h in a["student_hidden"]]
    learnt = guide(a["query"], a["teacher_to_student"])
    frozen = guide(fixed["query"], fixed["teacher_to_student"])
    ids = fixed["student_ids"]
    wrong = [-log_softmax(learnt[i])[ids[i]] for i in range(t)]
    apart = [kl(frozen[i], own[i], temperature) if frozen[i].argmax() == ids[i] else 0.0 for i in range(t)]
    back = [softmax(row) for row in attention(a["query"]).T]
    states = [w @ (a["student_hidden"] @ a["student_to_teacher"].T) for w in back]
    head = fixed["teacher_head"]
    far = [kl(head @ fixed["teacher_hidden"][j], head @ states[j], temperature) for j in range(u)]
    return {"t2s": float(np.mean(wrong)), "student": float(np.mean(apart)), "teacher": float(np.mean(far))}


def dual_space_case(rng: np.random.RandomState) -> dict[str, Any]:
    t, u, d1, d2, v1, v2 = 4, 3, 3, 2, 6, 5
    shapes = {
        "student_hidden": (t, d1), "student_inputs": (t, d1), "student_targets": (t, d1), "student_head": (v1, d1),
        "teacher_hidden": (u, d2), "teacher_inputs": (u, d2), "teacher_targets": (u, d2), "teacher_head": (v2, d2),
        "query": (2 * d2, 2 * d1), "student_to_teacher": (d2, d1), "teacher_to_student": (d1, d2),
    }  # fmt: skip
    a = {name: np.round(rng.uniform(-1.5, 1.5, shape), 3) for name, shape in shapes.items()}
    a["student_ids"] = rng.randint(0, v1, size=t)
    learnt = ("student_hidden", "student_head", "query", "student_to_teacher", "teacher_to_student")

    def total(name: str) -> Callable[[np.ndarray], float]:
        return lambda value: sum(dskd(a | {name: value}, a, 2.0).values())

    return {
        "arrays": {name: value.tolist() for name, value in a.items()},
        "terms": dskd(a, a, 2.0),
        "gradients": {name: slope(total(name), a[name]) for name in learnt},
    }


def build() -> dict[str, Any]:
    rng = np.random.RandomState(2402)
    cases = ((4, 3, 7, 5, 4), (2, 5, 4, 9, 6), (3, 3, 5, 5, 5))
    return {"sorted": [sorted_case(rng, *sizes) for sizes in cases], "dual_space": dual_space_case(rng)}


if __name__ == "__main__":
    PATH.write_text(json.dumps(build()) + "\n")
    print(f"wrote {PATH}")
