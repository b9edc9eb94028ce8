"""Distillation steps: what a batch of padded rows gives is what its responses give one by one; no [R, K, V]."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.test_programs import GEMMA3, LENGTH, SCORED, SMOLLM2, abstract_batch, forbidden
from train.test_step import GEMMA, LLAMA, VOCABULARY, random_items, start

from ctpd_jax.core import baselines
from ctpd_jax.data.rows import BatchShape, PairItem, build_batch
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.decoder import hidden_states, logits_of, param_shapes, unembedding
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.schema import Batch, TeacherTokens
from ctpd_jax.settings import default_config
from ctpd_jax.train import distill
from ctpd_jax.train.sums import mean_of

TEACHER_VOCABULARY = 300
SETTINGS = {name: default_config()[name] for name in ("student_uld", "student_ot", "student_dskd")}
SLOTS, TEACHER_SLOTS, ROWS = 24, 30, 4


def one(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array)[None]


def case(stage: str) -> tuple[Batch, list[tuple[PairItem, np.ndarray, np.ndarray]], dict]:
    """Three responses in a batch of four rows; each with its teacher's figures [U, F] and ids [U + 1]."""
    rng, items = np.random.default_rng(3), [item._replace(rejected=None) for item in random_items(3)]
    width = GEMMA.hidden_size if stage == "student_dskd" else VOCABULARY if stage == "student_uld" else 7
    batch = build_batch(items, "response", BatchShape(ROWS, 64, SLOTS), 3)
    found = TeacherTokens(
        np.zeros((ROWS, TEACHER_SLOTS, width), np.float32),
        *np.zeros((2, ROWS, TEACHER_SLOTS), np.int32),
        np.zeros((ROWS, TEACHER_SLOTS), bool),
    )
    told = []
    for row, item in enumerate(items):
        count = len(item.chosen.tokens) + (4, -2, 9)[row]  # more, or fewer, than the student has
        ids = rng.integers(0, TEACHER_VOCABULARY, count + 1).astype(np.int32)
        figures = rng.normal(0, 2, (count, TEACHER_VOCABULARY)).astype(np.float32)
        if stage == "student_dskd":
            figures = rng.normal(0, 1, (count, width)).astype(np.float32)
        else:
            figures = np.asarray(baselines.sorted_probabilities(figures, width))
        found.features[row, :count], found.real[row, :count] = figures, True
        found.inputs[row, :count], found.targets[row, :count] = ids[:-1], ids[1:]
        told.append((item, figures, ids))
    params = start(LLAMA)
    if stage == "student_dskd":
        head = rng.normal(0, 1, (TEACHER_VOCABULARY, width)).astype(np.float32)
        shapes = distill.projector_shapes(LLAMA, GEMMA)
        params |= {
            "projectors": distill.init_projectors(shapes, jax.random.key(1)),
            "teacher": {"lm_head": {"weight": head}},
        }
    return batch._replace(teacher=found), told, params


def alone(stage: str, params: dict, item: PairItem, figures: np.ndarray, ids: np.ndarray) -> jax.Array:
    """The loss of one response from its full logits, without padding, rows and chunks."""
    tokens = np.concatenate([item.prompt, item.chosen.tokens])
    first, count = len(item.prompt), len(item.chosen.tokens)
    states = hidden_states(LLAMA, params, one(tokens))[:, first - 1 : -1]
    logits = logits_of(LLAMA, params, states)
    targets = item.chosen.tokens
    fluency = -jax.nn.log_softmax(logits[0])[np.arange(count), targets].mean()
    shared, everywhere = min(count, len(figures)), (jnp.ones((1, count)), jnp.ones((1, len(figures))))
    if stage == "student_uld":  # k reaches both vocabularies: ULD itself
        return 0.5 * fluency + 0.5 * baselines.uld_distance(logits[0, :shared], jnp.log(figures[:shared])).mean()
    if stage == "student_ot":
        p = baselines.sorted_probabilities(logits, figures.shape[1])
        own, theirs = p[0, :shared], figures[:shared]
        by_token = jnp.abs(own - theirs).sum(-1) + 0.1 * baselines.sorted_cross_entropy(own, theirs)
        return fluency + 0.15 * (by_token.mean() + 0.1 * baselines.sinkhorn_distance(p, one(figures), *everywhere)[0])
    table, head = params["model"]["embed_tokens"]["weight"], params["teacher"]["lm_head"]["weight"]
    embedded = one(table[tokens[first - 1 : -1]]), one(table[targets])
    student = baselines.Space(states, *embedded, one(targets), everywhere[0] > 0, unembedding(LLAMA, params))
    teacher = baselines.Space(
        one(figures), one(head[ids[:-1]]), one(head[ids[1:]]), one(ids[1:]), everywhere[1] > 0, head
    )
    matrices = [params["projectors"][name]["weight"] for name in baselines.Projectors._fields]
    terms = baselines.dual_space_terms(student, teacher, baselines.Projectors(*matrices), 2.0)
    return fluency + sum(terms.values())[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", SETTINGS)
def test_a_batch_is_its_responses_one_by_one(stage, monkeypatch):
    """Value and gradient, also where the positions meet the vocabulary in chunks."""
    monkeypatch.setattr(distill, "BLOCK_BYTES", 4 * VOCABULARY * ROWS * 7)  # seven positions of a row at a time
    batch, told, params = case(stage)
    method = distill.method_of(stage, SETTINGS[stage], GEMMA)
    loss = partial(distill.distill_sums, method, SETTINGS[stage], LLAMA, Compute())
    (total, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)

    @jax.jit
    @jax.value_and_grad
    def expected(params: dict) -> jax.Array:
        return sum(alone(stage, params, *each) for each in told)

    value, slopes = expected(params)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    assert sums["loss"][1] == 3 and mean_of(sums)["loss"] == pytest.approx(float(value) / 3, rel=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    gradient.pop("teacher", None), slopes.pop("teacher", None)  # frozen in a run
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), gradient, slopes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", SETTINGS)
def test_no_logits_in_the_compiled_step(stage):
    """The real pair: neither the student's logits nor the teacher's, but a block of each at a time."""
    student, teacher = from_hf(SMOLLM2), from_hf(GEMMA3)
    settings = SETTINGS[stage]
    width = settings.get("top_k", teacher.hidden_size)
    slot = jax.ShapeDtypeStruct((1, SCORED), jnp.int32)
    features = jax.ShapeDtypeStruct((1, SCORED, width), jnp.float32)
    batch = abstract_batch()._replace(
        teacher=TeacherTokens(features, slot, slot, jax.ShapeDtypeStruct((1, SCORED), bool))
    )
    params = param_shapes(student) | {"projectors": distill.projector_shapes(student, teacher)}
    frozen = {"teacher": {"lm_head": {"weight": jax.ShapeDtypeStruct((262144, 640), jnp.float32)}}}
    method = distill.method_of(stage, settings, teacher)

    def loss(params: dict, frozen: dict, batch: Batch) -> jax.Array:
        return distill.distill_sums(method, settings, student, Compute(), params | frozen, batch)[0]

    text = jax.jit(jax.grad(loss)).lower(params, frozen, batch).compile().as_text()
    assert f"[{student.vocab_size},{student.hidden_size}]" in text and LENGTH > SCORED
    for config in (student, teacher):
        assert not forbidden(text, config)
