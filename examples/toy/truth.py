"""What a finished run on the toy world found, held against the truth.

    python examples/toy/truth.py runs/demo

Two things are known here and nowhere else: the true reward of every answer that a model was asked for, and which pieces
of a response settle its preference. The second is what the contrastive pair has to find. Where a student's answers
were ranked (`ctpd propose`), the first says how well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # as a script: the package lies above this file, and nothing but a run's files is read
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ctpd_jax.annotate.store import MANIFEST, open_store
from ctpd_jax.errors import UserError
from ctpd_jax.schema import SIDES, AlignedPair, PreferencePair
from ctpd_jax.text.preferences import load_preferences
from toy.world import DECISIVE_REWARD, piece_spans, true_reward

# ------------------------------------------------------------------------------------------------ true rewards


def sampled_rewards(workdir: Path) -> dict[str, dict[str, float]]:
    """Return model -> mean true reward of its sampled answers, standard error of the mean, and count.

    Raises:
      UserError: the run was not evaluated.
    """
    files = {path.stem: path for path in (workdir / "evaluation" / "samples").glob("*.json")}
    if not files:
        raise UserError(f"{workdir}/evaluation/samples holds no answers; run `ctpd evaluate` first.")
    # The order of the run's own table, where it has written one.
    found = {}
    for name in [*_json(workdir / "evaluation.json").get("models", ()), *sorted(files)]:
        if name in files and name not in found:
            samples = _json(files[name])["samples"]
            found[name] = mean_and_error([true_reward(each["answer"], each["prompt"]) for each in samples])
    return found


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Return mean, standard error (NaN for one value) and count."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "error": spread / len(values) ** 0.5, "count": len(values)}


def ranking(workdir: Path) -> dict[str, float | int] | None:
    """Return the true rewards of the proposed pairs, and how often the better answer is the chosen one, ties one half.

    None where nothing was proposed.
    """
    path = workdir / "proposals" / "pairs.jsonl"
    if not path.is_file():
        return None
    pairs, _ = load_preferences(str(path))
    rewards = np.array([[true_reward(text, p.prompt) for text in (p.chosen, p.rejected)] for p in pairs])
    lead = rewards[:, 0] - rewards[:, 1]
    return {
        "true reward, chosen": float(rewards[:, 0].mean()),
        "true reward, rejected": float(rewards[:, 1].mean()),
        "the better one is chosen": float(((lead > 0) + (lead == 0) / 2).mean()),
        "proposed pairs": len(pairs),
    }


# ------------------------------------------------------------------------------------------------ decisive pieces


def decisive_pieces(workdir: Path) -> dict[str, float | int] | None:
    """Return `recovery` of the run's annotations; None where no contrastive pair measured them."""
    folder = workdir / "annotations"
    if "positive" not in _json(folder / MANIFEST).get("scorers", ()):
        return None
    # Training has held the store against its checksums; a table needs no second look.
    store = open_store(folder, verify=False)
    data = _json(workdir / "config.json")["data"]
    pairs, _ = load_preferences(data["train"], data["train_split"])
    return recovery((store[i] for i in range(len(store))), {pair.id: pair for pair in pairs})


def recovery(
    examples: Iterable[tuple[AlignedPair, Mapping[str, Mapping[str, np.ndarray]]]], raw: Mapping[str, PreferencePair]
) -> dict[str, float | int]:
    """Return the mean log-ratio of good, neutral and bad pieces, and how well it tells them apart (AUC).

    An AUC is the probability that a decisive piece has a more extreme log-ratio than a neutral one: 0.5 is chance.

    Args:
      examples: the store's: an aligned pair, and side -> scorer -> float32 [S], the log-probability of each span.
      raw: id -> the pair's texts.
    """
    pieces: list[tuple[float, float]] = []
    for pair, scores in examples:
        source = raw[pair.id]
        for side, name in enumerate(SIDES):
            # The log-ratio that weights are made of, before it is clipped.
            ratios = scores[name]["positive"] - scores[name]["negative"]
            text = (source.chosen, source.rejected)[side]
            pieces += piece_ratios(text, source.prompt[-1].content, pair.response(side).bounds, ratios)
    # Decisive pieces on both sides of the neutral ones; facts are near enough to nothing to count as neutral.
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


def piece_ratios(text: str, prompt: str, bounds: np.ndarray, ratios: np.ndarray) -> list[tuple[float, float]]:
    """Return (true reward, log pi+ - log pi-) of each piece of a response.

    `bounds` int [S+1] are the spans' byte offsets, `ratios` float [S] their log-ratios. A span belongs to the piece in
    which it begins; the end-of-turn span, which has no bytes, belongs to none.
    """
    whole = np.diff(bounds) > 0
    starts, values = bounds[:-1][whole], ratios[whole]
    found = []
    for piece in piece_spans(text, prompt):
        # A piece of which no span was scored, past the length limit, has no ratio.
        inside = (starts >= piece.start) & (starts < piece.end)
        if inside.any():
            found.append((piece.reward, float(values[inside].sum())))
    return found


def auc(higher: np.ndarray, lower: np.ndarray) -> float:
    """Return the probability that a value of `higher` exceeds one of `lower`, ties one half (Mann-Whitney U)."""
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    up_to = np.searchsorted(ordered, higher, side="right")
    return float((below + up_to).sum() / (2 * len(higher) * len(lower)))


# ------------------------------------------------------------------------------------------------ printed


def tables(workdir: Path) -> str:
    """Return the tables as text."""
    lines = ["True reward of the sampled answers", ""]
    for name, found in sampled_rewards(workdir).items():
        error = "" if np.isnan(found["error"]) else f" ± {found['error']:.2f}"
        lines.append(f"  {name:<14}{found['mean']:+.2f}{error}   n = {found['count']}")
    figures = {
        "How well the contrast ranks the student's answers": ranking(workdir),
        "How well the contrastive pair finds the decisive pieces": decisive_pieces(workdir),
    }
    for title, known in figures.items():
        lines += ["", title, ""] if known else []
        for name, value in (known or {}).items():
            lines.append(f"  {name:<26}" + (f"{value:7d}" if isinstance(value, int) else f"{value:7.3f}"))
    return "\n".join(lines)


def _json(path: Path) -> Any:
    """Return the content of a run's file, or {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold a finished run on the toy world against the truth.")
    parser.add_argument("workdir", type=Path)
    try:
        print(tables(parser.parse_args().workdir))
    except UserError as error:
        print(f"truth.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
