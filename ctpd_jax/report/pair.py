"""One pair as both models read it, and what is wrong with it; what inspect, the page and the terminal show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ctpd_jax.schema import MODELS, SIDES, AlignedPair, PreferencePair
from ctpd_jax.text.prepare import Limits
from ctpd_jax.text.prompts import TextModel
from ctpd_jax.text.shown import pieces, spelled

Texts = Mapping[str, TextModel]  # "teacher" and "student"


def pair_record(
    pair: AlignedPair,
    raw: PreferencePair,
    texts: Texts,
    weights: tuple[np.ndarray, np.ndarray] | None = None,
    scores: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """Return a pair as JSON holds it: prompts and spans with the text of every token, and what was measured of them.

    Args:
      weights: of the chosen and the rejected response's spans, float32 [S] each.
      scores: side -> scorer -> log-probabilities of the spans, float32 [S], as the store holds them.
    """
    # Weights are there once the pairs were annotated; the alignment is there before anything was trained.
    sides = {}
    for side, name in enumerate(SIDES):
        aligned, text = pair.response(side), (raw.chosen, raw.rejected)[side].encode("utf-8")
        spans = []
        for i in range(aligned.num_spans):
            spans.append(
                {
                    "text": text[aligned.bounds[i] : aligned.bounds[i + 1]].decode("utf-8", errors="replace"),
                    "teacher": pieces(texts["teacher"].tokenizer, aligned.teacher, i),
                    "student": pieces(texts["student"].tokenizer, aligned.student, i),
                    "weight": None if weights is None else float(weights[side][i]),
                    "logps": {scorer: float(values[i]) for scorer, values in scores[name].items()} if scores else {},
                }
            )
        sides[name] = {"spans": spans, "truncated": pair.truncated[side]}
    return {
        "id": pair.id,
        "source": raw.source,
        "prompt": [dataclasses.asdict(message) for message in raw.prompt],
        "read": {model: spelled(texts[model].tokenizer, pair.prompt(model)) for model in MODELS},
        **sides,
    }


def problems(pair: AlignedPair, texts: Texts, limits: Limits) -> list[str]:
    """Say what of a pair must never reach training; nothing, where the preparation is right."""
    found = []
    cut = any(pair.truncated) if limits.end_of_turn_both else None
    for model in MODELS:
        # 1. The prompt. Templates write a BOS of their own, and tokenizers may add another.
        bos, prompt = texts[model].tokenizer.hf.bos_token_id, pair.prompt(model)
        if bos is not None and (prompt[:2] == bos).sum() == 2:
            found.append(f"the {model}'s prompt begins with two BOS tokens")
        for side, name in enumerate(SIDES):
            # 2. Every scored token lies in a span, and every span has tokens of both.
            tokens, aligned = pair.tokens(model, side), pair.response(side)
            counts = np.bincount(tokens.span_ids[tokens.span_ids >= 0], minlength=aligned.num_spans)
            if (empty := np.flatnonzero(counts == 0)).size:
                found.append(f"span {empty[0]} of the {name} response has no {model} token")
            if (tokens.span_ids < 0).any():
                found.append(f"a {model} token of the {name} response lies in no span")
            # 3. What is scored ends where the turn does, or was cut.
            ended = tokens.ids[-1] == texts[model].end_of_turn
            if ended != (limits.end_of_turn and not (pair.truncated[side] if cut is None else cut)):
                what = "ends its turn although it was cut" if ended else "does not end on its end of turn"
                found.append(f"the {name} response {what}, in the {model}'s tokens")
    return found
