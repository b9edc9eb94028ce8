"""Accuracies, intervals, the length baseline."""

import numpy as np
import pytest

from ctpd_jax.evaluate.accuracy import accuracy, compare, lambda_shares, length_matched, wilson_interval


def test_ties_count_one_half():
    assert accuracy(np.array([1.0, 0.0, -1.0, 2.0])).value == pytest.approx(0.625)
    assert accuracy(np.zeros(0)) is None


def test_wilson_interval_against_published_values():
    # Newcombe (1998), table I: 81/263, and 0/20.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_length_matched_is_symmetric_and_bounded():
    lengths = np.array([[100, 80], [80, 100], [100, 79], [10, 10]])
    assert length_matched(lengths, 0.2).tolist() == [True, True, False, True]


def test_lambda_shares():
    shares = lambda_shares(np.array([0.0, 100.0, -100.0, 1e9]), beta=0.1)
    assert shares["below_0.05"] == 0.5 and shares["above_0.95"] == 0.25
    assert shares["mean"] == pytest.approx((0.5 + 0 + 1 + 0) / 4, abs=1e-4)


def test_compare_says_nothing_where_there_is_nothing_to_say():
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 100, (40, 2))
    logps = {name: -rng.uniform(0.5, 1.5, (40, 2)) * lengths for name in ("start", "ctpd", "teacher", "teacher_dpo")}
    starts = {"ctpd": "start", "teacher_dpo": "teacher"}
    betas = {"start": 0.1, "ctpd": 0.1, "teacher": 0.1, "teacher_dpo": 0.3}
    found = compare(logps, lengths, 2 * lengths, starts, ["start", "ctpd"], "teacher", betas, tolerance=0.2)
    models = found["models"]
    assert models["start"]["all"]["vs_start"] is None and models["start"]["margin_vs_start"] is None
    assert models["teacher"]["all"]["vs_teacher"] is None and models["teacher"]["lambda"] is None
    margin = logps["ctpd"] - logps["start"]
    assert models["ctpd"]["all"]["vs_start"].value == np.mean(margin[:, 0] > margin[:, 1])
    assert models["ctpd"]["margin_vs_start"] == pytest.approx(0.1 * np.mean(margin[:, 0] - margin[:, 1]))
    margin = logps["teacher_dpo"] - logps["teacher"]
    assert models["teacher_dpo"]["all"]["vs_start"].value == np.mean(margin[:, 0] > margin[:, 1])
    assert models["teacher_dpo"]["margin_vs_start"] == pytest.approx(0.3 * np.mean(margin[:, 0] - margin[:, 1]))
    per_byte = logps["start"] / lengths
    assert models["start"]["all"]["per_byte"].value == np.mean(per_byte[:, 0] > per_byte[:, 1])
    nats = -logps["start"][:, 0].sum() / lengths[:, 0].sum()
    assert models["start"]["bits_per_byte"] == pytest.approx(nats / np.log(2))
    assert found["longer_is_better"]["all"].count == 40
    assert found["longer_is_better"]["length_matched"].count == length_matched(lengths, 0.2).sum()
