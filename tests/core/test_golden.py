"""The library against the golden numbers of tests/golden: every loss and weight option, values and gradients."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctpd_jax.core import losses, objectives, weights
from ctpd_jax.core.logprobs import token_logprobs
from ctpd_jax.core.projection import project_to_tokens, span_counts, span_means, span_sums
from ctpd_jax.schema import SpanSlots

SCRIPT = Path(__file__).parents[1] / "golden" / "make_golden.py"
GOLDEN: dict[str, Any] = json.loads(SCRIPT.with_name("core.json").read_text())
SIDES = (("chosen", 1.0), ("rejected", -1.0))
# float64 shows that the formula is the same; float32 is what runs.
PRECISIONS = {"float64": {"rtol": 1e-12, "atol": 1e-12}, "float32": {"rtol": 1e-6, "atol": 1e-6}}


def padded(rows: list[list[float]], fill: float) -> np.ndarray:
    """[B, longest + 2]: two entries of padding even in the longest row, filled with what must not matter."""
    width = max(map(len, rows)) + 2
    return np.array([row + [fill] * (width - len(row)) for row in rows])


def side_arrays(side: str, dtype: str) -> dict[str, np.ndarray]:
    responses = [pair[side] for pair in GOLDEN["pairs"]]
    arrays = {
        name: padded([r[name] for r in responses], np.nan).astype(dtype)
        for name in ("policy", "start", "reference", "positive", "negative", "bytes")
    }
    for name in ("student_span_ids", "teacher_span_ids"):
        arrays[name] = padded([r[name] for r in responses], -1).astype(np.int32)
    arrays["mask"] = ~np.isnan(arrays["bytes"])
    return arrays


def ragged(array: Any, mask: np.ndarray) -> list[list[float]]:
    return [np.asarray(row)[keep].tolist() for row, keep in zip(array, mask)]


def weights_of(kind: str, a: dict[str, np.ndarray], mu: float) -> jax.Array:
    mask, spans = a["mask"], a["mask"].shape[1]
    logps = [span_sums(a[name], a["teacher_span_ids"], spans) for name in ("positive", "negative")]
    w = weights.importance_weights(*logps, mu=mu, mask=mask)
    if kind == "none":
        return w
    if kind == "other bounds and k":
        return weights.importance_weights(*logps, mu=mu, k=0.7, lower=-1.0, upper=0.8, mask=mask)
    if kind == "uniform":
        return weights.uniform_weights(mask)
    if kind.startswith("binary"):
        return weights.binary_weights(w, percent=float(kind.split()[1]), mask=mask)
    transforms = {
        "threshold": weights.threshold_weights,
        "scale": weights.scale_weights,
        "rank": weights.rank_weights,
        "mean_one": weights.mean_one_weights,
        "agree": weights.agreeing_weights,
    }
    return transforms[kind](w, mask=mask)


def test_the_script_makes_the_file() -> None:
    specification = importlib.util.spec_from_file_location("make_golden", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def compare(made: Any, stored: Any, where: str) -> None:
        assert type(made) is type(stored), where
        if isinstance(made, dict):
            assert made.keys() == stored.keys(), where
            for key in made:
                compare(made[key], stored[key], f"{where}.{key}")
        elif isinstance(made, list):
            assert len(made) == len(stored), where
            for i, (m, s) in enumerate(zip(made, stored)):
                compare(m, s, f"{where}[{i}]")
        elif isinstance(made, float):
            assert made == pytest.approx(stored, rel=1e-12, abs=1e-12), where
        else:
            assert made == stored, where

    compare(module.build(), GOLDEN, "core.json")


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_token_logprobs(dtype: str) -> None:
    golden = GOLDEN["token_logprobs"]
    with jax.enable_x64(True):
        hidden, unembedding = (np.array(golden[name], dtype) for name in ("hidden", "unembedding"))
        for case in golden["cases"]:
            for chunk in (None, 1, 2, 4, 6):
                values = token_logprobs(hidden, unembedding, np.array(golden["targets"]), chunk, case["softcap"])
                assert values.dtype == dtype
                np.testing.assert_allclose(values, case["values"], **PRECISIONS[dtype])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("side, mu", SIDES)
def test_span_sums_and_weights(side: str, mu: float, dtype: str) -> None:
    with jax.enable_x64(True):
        a = side_arrays(side, dtype)
        sums = span_sums(a["policy"], a["student_span_ids"], a["mask"].shape[1])
        np.testing.assert_array_equal(np.asarray(sums)[~a["mask"]], 0)
        for b, row in enumerate(ragged(sums, a["mask"])):
            np.testing.assert_allclose(row, GOLDEN["spans"][b][side]["sums"], **PRECISIONS[dtype])
        for kind in GOLDEN["spans"][0][side]["weights"]:
            w = weights_of(kind, a, mu)
            np.testing.assert_array_equal(np.asarray(w)[~a["mask"]], 0)
            for b, row in enumerate(ragged(w, a["mask"])):
                expected = GOLDEN["spans"][b][side]["weights"][kind]
                np.testing.assert_allclose(row, expected, **PRECISIONS[dtype], err_msg=f"{kind}, response {b}")


# ------------------------------------------------------------------------------------------------ losses


def span_form(policy: jax.Array, a: dict[str, np.ndarray], w: jax.Array, options: dict[str, Any]) -> jax.Array:
    spans = w.shape[-1]
    pool = {"sum": span_sums, "mean": span_means}[options["span_logprob"]]
    reference = {
        "teacher": pool(a["reference"], a["teacher_span_ids"], spans),
        "start": pool(a["start"], a["student_span_ids"], spans),
        "none": jnp.zeros_like(w),
    }[options["reference"]]
    counts = span_counts(a["student_span_ids"], spans)
    scaled = w / losses.reward_normalizer(counts, a["bytes"], options["normalize"])
    return losses.span_return(pool(policy, a["student_span_ids"], spans), reference, scaled)


def token_form(policy: jax.Array, a: dict[str, np.ndarray], w: jax.Array, options: dict[str, Any]) -> jax.Array:
    spans = w.shape[-1]
    ids, name = {
        "teacher": (a["teacher_span_ids"], "reference"),
        "start": (a["student_span_ids"], "start"),
        "none": (None, ""),
    }[options["reference"]]
    coefficients, constant = losses.reward_coefficients(
        w,
        span_counts(a["student_span_ids"], spans),
        None if ids is None else span_sums(a[name], ids, spans),
        None if ids is None else span_counts(ids, spans),
        a["bytes"],
        options["span_logprob"],
        options["normalize"],
    )
    token_weights = project_to_tokens(coefficients, a["student_span_ids"])
    rows = np.broadcast_to(np.arange(len(policy))[:, None], policy.shape)  # one response a row
    return losses.response_returns(policy, token_weights, rows, constant)


@pytest.mark.parametrize("form", [span_form, token_form])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("golden", GOLDEN["losses"], ids=lambda g: "-".join(map(str, g["options"].values())))
def test_losses(golden: dict[str, Any], dtype: str, form: Any) -> None:
    """Both forms of the return give the golden values and gradients, for every option: so they are identical."""
    options, pairs = golden["options"], golden["pairs"]
    with jax.enable_x64(True):
        sides = {side: side_arrays(side, dtype) for side, _ in SIDES}
        w = {side: weights_of(options["weights"], sides[side], mu).astype(dtype) for side, mu in SIDES}

        def pair_losses(policy: dict[str, jax.Array]) -> tuple[jax.Array, losses.LossOutput]:
            returns = [form(policy[side], sides[side], w[side], options) for side, _ in SIDES]
            out = losses.preference_loss(*returns, GOLDEN["beta"], options["label_smoothing"], options["loss"])
            if options["sft"]:
                covered = sides["chosen"]["student_span_ids"] >= 0
                logps = jnp.where(covered, policy["chosen"], 0).sum(axis=-1)
                term = losses.sft_term(logps, covered.sum(axis=-1))
                out = out._replace(loss=out.loss + GOLDEN["sft_weight"] * term)
            return out.loss.sum(), out

        policy = {side: jnp.asarray(sides[side]["policy"]) for side, _ in SIDES}
        gradients, out = jax.grad(pair_losses, has_aux=True)(policy)
        assert out.loss.dtype == dtype
        names = {"loss": "loss", "chosen_rewards": "chosen_reward", "rejected_rewards": "rejected_reward", "lam": "lam"}
        for ours, theirs in names.items():
            np.testing.assert_allclose(getattr(out, ours), [p[theirs] for p in pairs], **PRECISIONS[dtype])
        for side, _ in SIDES:
            for b, pair in enumerate(pairs):
                expected = pair["gradients"][side]
                tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else PRECISIONS[dtype]
                np.testing.assert_allclose(gradients[side][b, : len(expected)], expected, **tolerance)
                np.testing.assert_array_equal(gradients[side][b, len(expected) :], 0)


# ------------------------------------------------------------------------------------------------ objectives beyond


def slots_of(targets: jax.Array, ids: np.ndarray) -> SpanSlots:
    """The token form of spans: one response a row."""
    first = (ids >= 0) & (np.diff(ids, prepend=-1, axis=1) > 0)
    spans = ids.max(axis=1, keepdims=True) + 1
    return SpanSlots(ids, project_to_tokens(targets, ids), first / spans)


@pytest.mark.parametrize("form", ["spans", "slots"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_span_regression(side: str, dtype: str, form: str) -> None:
    """The mean over spans, and what the training step computes of tokens: value and gradient."""
    golden = GOLDEN["objectives"]
    with jax.enable_x64(True):
        a = side_arrays(side, dtype)
        student, spans = a["student_span_ids"], a["mask"].shape[1]
        start = span_sums(a["start"], student, spans)
        aligned, before = (span_sums(a[name], a["teacher_span_ids"], spans) for name in ("positive", "reference"))
        targets = objectives.span_targets(start, aligned, before, golden["tau"], golden["clip"])

        def loss(policy: jax.Array) -> tuple[jax.Array, jax.Array]:
            if form == "spans":
                errors = objectives.span_regression_loss(span_sums(policy, student, spans), targets, a["mask"])
            else:
                rows = np.broadcast_to(np.arange(len(student))[:, None], student.shape)
                errors = objectives.response_errors(policy, slots_of(targets, student), rows, len(student))
            return errors.sum(), errors

        gradient, errors = jax.grad(loss, has_aux=True)(jnp.asarray(a["policy"]))
        for b, (pair, own) in enumerate(zip(golden["regression"], ragged(targets, a["mask"]))):
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else PRECISIONS[dtype]
            np.testing.assert_allclose(own, pair[side]["targets"], **PRECISIONS[dtype])
            np.testing.assert_allclose(errors[b], pair[side]["loss"], **tolerance)
            count = len(pair[side]["gradient"])
            np.testing.assert_allclose(gradient[b, :count], pair[side]["gradient"], **tolerance)
            np.testing.assert_array_equal(gradient[b, count:], 0)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_labels_and_weights_of_margins(dtype: str) -> None:
    golden = GOLDEN["objectives"]
    with jax.enable_x64(True):
        for function, name in ((objectives.pair_labels, "labels"), (objectives.sure_weights, "weights")):
            found = function(np.array(golden["margins"], dtype), golden["tau"])
            np.testing.assert_allclose(found, golden[name], **PRECISIONS[dtype])
