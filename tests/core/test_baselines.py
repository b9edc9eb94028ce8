"""The baselines' kernels against tests/golden/baselines.json, values and gradients, and what must hold of any input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax import uld_distance
from ctpd_jax.core import baselines

SCRIPT = Path(__file__).parents[1] / "golden" / "make_baselines.py"
GOLDEN: dict[str, Any] = json.loads(SCRIPT.with_name("baselines.json").read_text())
# float64 shows that the formula is the same; float32 is what runs. Golden gradients are central differences.
PRECISIONS = {"float64": {"rtol": 1e-12, "atol": 1e-12}, "float32": {"rtol": 2e-6, "atol": 2e-6}}
SLOPES = {"float64": {"rtol": 1e-7, "atol": 1e-8}, "float32": {"rtol": 2e-5, "atol": 5e-6}}


def test_the_script_makes_the_file() -> None:
    specification = importlib.util.spec_from_file_location("make_baselines", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    made, stored = (jax.tree.flatten(each) for each in (json.loads(json.dumps(module.build())), GOLDEN))
    assert made[1] == stored[1]
    np.testing.assert_allclose(made[0], stored[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", GOLDEN["sorted"], ids=["longer student", "longer teacher", "whole vocabularies"])
def test_sorted_probabilities(case: dict[str, Any], dtype: str) -> None:
    k = case["k"]
    with jax.enable_x64(True):
        student, teacher = (jnp.array(case[name], dtype) for name in ("student", "teacher"))
        shared = min(len(student), len(teacher))

        def compared(function: Any, logits: jax.Array) -> jax.Array:
            both = (baselines.sorted_probabilities(each[:shared], k) for each in (logits, teacher))
            return function(*both)

        def whole(logits: jax.Array, behind: int = 0) -> jax.Array:
            """With `behind` positions of padding, which must not matter."""
            x, y = (baselines.sorted_probabilities(each, k) for each in (logits, teacher))
            x, y = (jnp.pad(each, ((0, behind), (0, 0)), constant_values=0.7)[None] for each in (x, y))
            real = (jnp.arange(x.shape[1])[None] < len(logits), jnp.arange(y.shape[1])[None] < len(teacher))
            return baselines.sinkhorn_distance(x, y, *real)[0]

        functions = {
            "uld": lambda logits: uld_distance(logits, teacher),
            "top": lambda logits: compared(baselines.top_distance, logits),
            "cross_entropy": lambda logits: compared(baselines.sorted_cross_entropy, logits),
            "sinkhorn": whole,
        }
        for name, function in functions.items():
            gradient, value = jax.jit(jax.grad(lambda x, f=function: (f(x).sum(), f(x)), has_aux=True))(student)
            assert value.dtype == dtype
            np.testing.assert_allclose(value, case[name], **PRECISIONS[dtype], err_msg=name)
            np.testing.assert_allclose(gradient, case[f"{name}_gradient"], **SLOPES[dtype], err_msg=name)
        value, gradient = jax.jit(jax.value_and_grad(lambda x: whole(x, behind=3)))(student)
        np.testing.assert_allclose(value, case["sinkhorn"], **PRECISIONS[dtype])
        np.testing.assert_allclose(gradient, case["sinkhorn_gradient"], **SLOPES[dtype])


LEARNT = ("student_hidden", "student_head", "query", "student_to_teacher", "teacher_to_student")


def dual_space(arrays: dict[str, jax.Array], behind: int, chunk: int | None) -> dict[str, jax.Array]:
    """The golden response as a batch of two, the second of them padding, with `behind` positions of padding."""

    def space(name: str) -> baselines.Space:
        found = {part: arrays[f"{name}_{part}"] for part in ("hidden", "inputs", "targets")}
        count, width = found["hidden"].shape
        rows = {
            part: jnp.concatenate([jnp.pad(each, ((0, behind), (0, 0)), constant_values=3.0)[None],
                                   jnp.zeros((1, count + behind, width), each.dtype)])
            for part, each in found.items()
        }  # fmt: skip
        real = jnp.zeros((2, count + behind), bool).at[0, :count].set(True)
        ids = jnp.zeros((2, count + behind), jnp.int32)
        if name == "student":
            ids = ids.at[0, :count].set(arrays["student_ids"])
        return baselines.Space(**rows, ids=ids, real=real, head=arrays[f"{name}_head"])

    matrices = baselines.Projectors(*(arrays[name] for name in LEARNT[2:]))
    return baselines.dual_space_terms(space("student"), space("teacher"), matrices, 2.0, chunk)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("behind", "chunk"), [(0, None), (3, 2), (1, 3)])
def test_dual_spaces(behind: int, chunk: int | None, dtype: str) -> None:
    golden = GOLDEN["dual_space"]
    with jax.enable_x64(True):
        arrays = {name: jnp.array(value, dtype) for name, value in golden["arrays"].items()}
        arrays["student_ids"] = jnp.array(golden["arrays"]["student_ids"], jnp.int32)

        def total(learnt: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            terms = dual_space(arrays | learnt, behind, chunk)
            return sum(value[0] for value in terms.values()), terms

        gradients, terms = jax.jit(jax.grad(total, has_aux=True))({name: arrays[name] for name in LEARNT})
        for name, value in golden["terms"].items():
            assert value > 0.05  # of "student" some tokens are right, so that it is looked at
            np.testing.assert_allclose(terms[name], [value, 0], **PRECISIONS[dtype], err_msg=name)
        for name in LEARNT:
            np.testing.assert_allclose(gradients[name], golden["gradients"][name], **SLOPES[dtype], err_msg=name)


@given(st.integers(0, 2**31), st.sampled_from([(3, 5, 4, 7), (2, 1, 6, 3)]))
@settings(max_examples=20, deadline=None)
def test_uld_is_a_distance_that_knows_no_order(seed: int, sizes: tuple[int, int, int, int]) -> None:
    rng, (t, u, v1, v2) = np.random.default_rng(seed), sizes
    student, teacher = rng.normal(size=(t, v1)).astype(np.float32), rng.normal(size=(u, v2)).astype(np.float32)
    found = uld_distance(student, teacher)
    assert found.shape == (min(t, u),) and found.dtype == jnp.float32
    assert (found >= 0).all() and (found <= 2 + 1e-5).all()
    np.testing.assert_allclose(found, uld_distance(teacher, student), atol=1e-6)
    shuffled = teacher[:, rng.permutation(v2)]
    np.testing.assert_allclose(found, uld_distance(student, shuffled), atol=1e-6)
    # Of the k largest alone it is never more, and it grows with k up to the distance itself.
    p, q = (np.asarray(baselines.sorted_probabilities(each[: min(t, u)], max(v1, v2))) for each in (student, teacher))
    below = [np.abs(p - q)[:, :k].sum(1) + np.abs((p - q)[:, :k].sum(1)) for k in range(1, max(v1, v2) + 1)]
    assert (np.diff(below, axis=0) >= -1e-5).all()
    np.testing.assert_allclose(below[-1], found, atol=1e-5)
    np.testing.assert_allclose(below[-1], baselines.top_distance(p, q), atol=1e-6)


def test_sinkhorn_of_the_same_responses_is_nearly_nothing_and_moves_nothing_else() -> None:
    """Positions that are far apart are not mixed: the plan is the identity."""
    x = jnp.array([[[1.0, 0.0], [0.5, 0.5]]])
    real = jnp.ones((1, 2), bool)
    assert baselines.sinkhorn_distance(x, x, real, real)[0] < 1e-3
    # One position on either side: all of the mass has one way to go.
    one = baselines.sinkhorn_distance(x[:, :1], x[:, 1:], real[:, :1], real[:, 1:])
    np.testing.assert_allclose(one, [1.0], rtol=1e-6)
