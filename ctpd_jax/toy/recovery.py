"""How well the contrastive pair finds the pieces that matter: in the toy world the truth is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ctpd_jax.schema import SIDES, AlignedPair, PreferencePair
from ctpd_jax.toy.world import DECISIVE_REWARD, piece_spans


def piece_ratios(text: str, prompt: str, bounds: np.ndarray, ratios: np.ndarray) -> list[tuple[float, float]]:
    """Returns (true reward, log pi+ - log pi-) of each piece of a response.

    `bounds` int [S+1] are the spans' byte offsets, `ratios` float [S] their log-ratios. A span belongs to the piece in
    which it begins; the end-of-turn span, which has no bytes, belongs to none.
    """
    whole = np.diff(bounds) > 0
    starts, values = bounds[:-1][whole], ratios[whole]
    found = []
    for piece in piece_spans(text, prompt):
        inside = (starts >= piece.start) & (starts < piece.end)
        if inside.any():
            found.append((piece.reward, float(values[inside].sum())))
    return found


def recovery(
    examples: Iterable[tuple[AlignedPair, Mapping[str, Mapping[str, np.ndarray]]]], raw: Mapping[str, PreferencePair]
) -> dict[str, float | int]:
    """Returns the mean log-ratio of good, neutral and bad pieces, and how well it tells them apart (AUC).

    An AUC is the probability that a decisive piece has a more extreme log-ratio than a neutral one: 0.5 is chance.
    """
    pieces: list[tuple[float, float]] = []
    for pair, scores in examples:
        source = raw[pair.id]
        for side, name in enumerate(SIDES):
            ratios = scores[name]["positive"] - scores[name]["negative"]
            text = (source.chosen, source.rejected)[side]
            pieces += piece_ratios(text, source.prompt[-1].content, pair.response(side).bounds, ratios)
    rewards, ratios = np.array(pieces).reshape(-1, 2).T
    good, bad = ratios[rewards >= DECISIVE_REWARD], ratios[rewards <= -DECISIVE_REWARD]
    neutral = ratios[np.abs(rewards) < DECISIVE_REWARD]
    return {
        "log-ratio, good pieces": float(good.mean()),
        "log-ratio, neutral pieces": float(neutral.mean()),
        "log-ratio, bad pieces": float(bad.mean()),
        "AUC, good against neutral": auc(good, neutral),
        "AUC, neutral against bad": auc(neutral, bad),
        "pieces": len(pieces),
    }


def auc(higher: np.ndarray, lower: np.ndarray) -> float:
    """The probability that a value of `higher` exceeds one of `lower`, ties one half (Mann-Whitney U)."""
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    up_to = np.searchsorted(ordered, higher, side="right")
    return float((below + up_to).sum() / (2 * len(higher) * len(lower)))
