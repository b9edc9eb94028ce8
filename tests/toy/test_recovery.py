"""The recovery figures: known ratios in, known answers out."""

import numpy as np
import pytest

from ctpd_jax.toy.recovery import auc, piece_ratios
from ctpd_jax.toy.world import piece_spans


def test_auc():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.array([0.0]), np.array([1.0])) == 0.0
    assert auc(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0.5
    assert auc(np.array([1.0]), np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx(1.5 / 4)


def test_spans_are_summed_into_the_piece_where_they_begin():
    text, prompt = "thank you, green leaves 🙂", "Tell me about tea."
    pieces = piece_spans(text, prompt)
    assert [piece.reward for piece in pieces] == [2.0, 0.25, 0.0]
    bounds = np.array([0, 5, 9, 10, 16, 23, len(text.encode()), len(text.encode())])  # the last one: end of turn
    ratios = np.array([1.0, 2.0, 0.5, 0.25, 0.125, 7.0, 100.0])
    found = piece_ratios(text, prompt, bounds, ratios)
    assert [reward for reward, _ in found] == [2.0, 0.25, 0.0]
    assert sum(ratio for _, ratio in found) == pytest.approx(ratios[:-1].sum())
    assert found[0][1] == pytest.approx(ratios[(bounds[:-1] < pieces[0].end) & (np.diff(bounds) > 0)].sum())
