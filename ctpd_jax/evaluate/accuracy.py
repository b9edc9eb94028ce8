"""How often a model prefers the chosen response, in three senses, each with its interval; and the length baseline.

N pairs. Every accuracy has weights of one: annotated weights know the label (mu is +1 or -1), so a margin that uses
them would grade itself. Ties count one half.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from ctpd_jax.schema import CHOSEN, REJECTED


@dataclass(frozen=True)
class Accuracy:
    """A share of `count` pairs with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    count: int


def accuracy(margins: np.ndarray) -> Accuracy | None:
    """Return the share of positive margins, float [N], ties one half; None where there is no pair."""
    count = len(margins)
    if not count:
        return None
    share = float(np.mean((margins > 0) + 0.5 * (margins == 0)))
    low, high = wilson_interval(share, count)
    return Accuracy(share, low, high, count)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a binomial share (E. B. Wilson, 1927)."""
    z = 1.959964  # the normal distribution's quantile of 97.5 %
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def length_matched(lengths: np.ndarray, tolerance: float) -> np.ndarray:
    """Return bool [N]: the two responses' byte lengths [N, 2] differ by at most `tolerance` of the longer one."""
    return np.abs(difference(lengths)) <= tolerance * lengths.max(axis=1)


def difference(values: np.ndarray) -> np.ndarray:
    """Return chosen minus rejected: [N, 2] -> [N]."""
    return values[:, CHOSEN] - values[:, REJECTED]


def lambda_shares(margins: np.ndarray, beta: float) -> dict[str, float]:
    """Return how lambda = sigmoid(-beta * margin), the weight that the loss gives a pair, is spread over the pairs."""
    # Beyond 60 the exponential changes nothing that float64 shows, and would overflow.
    lam = 1 / (1 + np.exp(np.clip(beta * margins, -60, 60)))
    return {
        "mean": float(lam.mean()),
        "below_0.05": float((lam < 0.05).mean()),
        "above_0.95": float((lam > 0.95).mean()),
    }


def compare(
    logps: Mapping[str, np.ndarray],
    covered: np.ndarray,
    lengths: np.ndarray,
    starts: Mapping[str, str],
    students: Collection[str],
    teacher: str,
    betas: Mapping[str, float],
    tolerance: float,
) -> dict:
    """Return a row of figures for each model, and the baseline.

    `logps[model]` are summed response log-probabilities, float64 [N, 2], over the `covered` bytes [N, 2] of responses
    of `lengths` bytes [N, 2]; `starts` names the row that a model was trained from, `students` and `teacher` the rows
    that are such, `betas` what their margins and lambdas are scaled by. Figures, each on all pairs and on those of
    about the same length:
      per_byte  log-probability per byte of text: comparable across tokenizers
      vs_start  implicit reward against the model's own start; None for what was not trained here
      vs_teacher  implicit reward against the teacher, as in training; None for teachers, and where none was read
    """
    subsets = {"all": np.ones(len(lengths), bool), "length_matched": length_matched(lengths, tolerance)}
    rows: dict[str, dict] = {}
    for name, values in logps.items():
        # 1. Chosen minus rejected in each sense that the model has.
        vs_start = difference(values - logps[starts[name]]) if name in starts else None
        vs_teacher = difference(values - logps[teacher]) if name in students and teacher in logps else None
        senses = {"per_byte": difference(values / covered), "vs_start": vs_start, "vs_teacher": vs_teacher}
        # 2. The share of pairs in which that is positive.
        row: dict[str, object] = {}
        for subset, keep in subsets.items():
            row[subset] = {sense: None if m is None else accuracy(m[keep]) for sense, m in senses.items()}
        # 3. Figures that are no share.
        row["margin_vs_start"] = None if vs_start is None else float(betas[name] * vs_start.mean())
        row["lambda"] = None if vs_teacher is None else lambda_shares(vs_teacher, betas[name])
        row["bits_per_byte"] = -float(values[:, CHOSEN].sum()) / float(covered[:, CHOSEN].sum()) / float(np.log(2))
        rows[name] = row
    longer = {subset: accuracy(difference(lengths)[keep].astype(float)) for subset, keep in subsets.items()}
    return {"models": rows, "longer_is_better": longer}
