"""What a distillation stage minimises: the chosen responses' likelihood, and the teacher's distributions over them.

A row of its batches is one response, so that slot t of a row is token t of the student's, and `Batch.teacher` holds the
teacher's tokens of the same response. A response counts as much as another, whatever its length.

Letters: R rows, K scored tokens of a row, U teacher tokens of a response, k sorted probabilities, V a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctpd_jax.core.baselines import (
    Projectors,
    Space,
    by_chunks,
    dual_space_terms,
    mean_over,
    sinkhorn_distance,
    sorted_cross_entropy,
    sorted_probabilities,
    top_distance,
)
from ctpd_jax.core.logprobs import BLOCK_BYTES
from ctpd_jax.models.compute import Compute, logprobs_of, scored_states
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, logits_of, unembedding
from ctpd_jax.schema import Array, Batch, TeacherTokens
from ctpd_jax.train.sums import Sums, token_sums

OT_WEIGHT = 0.1  # of Multi-Level OT's sorted cross-entropy, and of its Sinkhorn distance (arXiv 2412.14528)

Terms = dict[str, Array]  # name -> float32 [R]
# (student, params, batch, states [R, K, D] of the scored slots, compute) -> the terms of the distillation.
Method = Callable[[DecoderConfig, Params, Batch, Array, Compute], Terms]


def distill_sums(
    method: Method, settings: ConfigDict, config: DecoderConfig, compute: Compute, params: Params, batch: Batch
) -> tuple[Array, Sums]:
    """Returns the summed loss of the batch's responses, and the sums that are logged.

    ce_weight * (mean of -log pi(y_t)) + weight * (sum of the method's terms), for each response.
    """
    # 1. The student's states of its scored tokens, and how likely these are.
    states = scored_states(config, params, batch, compute)
    slots = batch.pair >= 0
    fluency = mean_over(-logprobs_of(config, params, states, batch, compute), slots)

    # 2. The loss of each response; rows that only fill the batch count nothing.
    terms = method(config, params, batch, states, compute)
    loss = settings.ce_weight * fluency + settings.weight * sum(terms.values())
    real = slots.any(axis=1)
    total, count = jnp.where(real, loss, 0).sum(), real.sum(dtype=jnp.float32)
    means = {"loss": loss, "distill/ce": fluency, **{f"distill/{name}": value for name, value in terms.items()}}
    sums = {name: jnp.stack([jnp.where(real, value, 0).sum(), count]) for name, value in means.items()}
    return total, sums | token_sums(batch)


# ------------------------------------------------------------------------------------------------ methods


def uld_terms(config: DecoderConfig, params: Params, batch: Batch, states: Array, compute: Compute) -> Terms:
    """ULD (arXiv 2402.12030) of the k largest probabilities: see core.baselines.top_distance."""
    student, teacher, shared = compared(config, params, batch, states, compute)
    return {"uld": mean_over(top_distance(student, teacher), shared)}


def ot_terms(config: DecoderConfig, params: Params, batch: Batch, states: Array, compute: Compute) -> Terms:
    """Multi-Level OT (arXiv 2412.14528): token by token over the k largest probabilities, and whole responses."""
    student, teacher, shared = compared(config, params, batch, states, compute)
    found = teacher_of(batch)
    moved = sinkhorn_distance(student, found.features, batch.pair >= 0, found.real)
    return {
        "sorted": mean_over(jnp.abs(student - teacher).sum(axis=-1), shared),
        "cross_entropy": OT_WEIGHT * mean_over(sorted_cross_entropy(student, teacher), shared),
        "sinkhorn": OT_WEIGHT * moved,
    }


def dskd_terms(
    temperature: float,
    softcap: float | None,
    config: DecoderConfig,
    params: Params,
    batch: Batch,
    states: Array,
    compute: Compute,
) -> Terms:
    """DSKD with cross-model attention (arXiv 2406.17328); `softcap` is that of the teacher's head.

    `params` also has the `projectors` and the teacher's head, whose rows stand for its embeddings (they are the same
    where it ties them).
    """
    # 1. Both models' tokens as [input; target] embeddings.
    table, head = params["model"]["embed_tokens"]["weight"], params["teacher"]["lm_head"]["weight"]
    before, found = jnp.take_along_axis(batch.tokens, batch.predictor, axis=1), teacher_of(batch)
    own = unembedding(config, params).astype(states.dtype)
    slots = batch.pair >= 0
    student = Space(states, table[before], table[batch.target], batch.target, slots, own, config.final_softcap)
    inputs, targets = head[found.inputs], head[found.targets]
    teacher = Space(found.features, inputs, targets, found.targets, found.real, head.astype(states.dtype), softcap)

    # 2. Chunks for the larger of the two vocabularies.
    matrices = Projectors(*(params["projectors"][name]["weight"] for name in Projectors._fields))
    chunk = positions_at_once(max(len(own), len(head)), len(states), compute)
    return dual_space_terms(student, teacher, matrices, temperature, chunk)


def method_of(stage: str, settings: ConfigDict, teacher: DecoderConfig) -> Method:
    """The method of a stage."""
    if stage == "student_dskd":
        return partial(dskd_terms, settings.temperature, teacher.final_softcap)
    return {"student_uld": uld_terms, "student_ot": ot_terms}[stage]


# ------------------------------------------------------------------------------------------------ what they share


def top_probabilities(config: DecoderConfig, params: Params, states: Array, k: int, compute: Compute) -> Array:
    """Returns the k largest next-token probabilities of hidden states [R, K, D], float32 [R, K, k], descending."""

    def largest(part: Array) -> Array:
        return sorted_probabilities(logits_of(config, params, part), k)

    return by_chunks(largest, positions_at_once(config.vocab_size, len(states), compute), states)


def positions_at_once(vocabulary: int, rows: int, compute: Compute) -> int:
    """How many positions of all rows make a float32 block of logits of the usual size on every device."""
    devices = 1 if compute.mesh is None else compute.mesh.devices.size
    return max(1, BLOCK_BYTES * devices // (4 * vocabulary * rows))


def compared(
    config: DecoderConfig, params: Params, batch: Batch, states: Array, compute: Compute
) -> tuple[Array, Array, Array]:
    """Returns the student's and the teacher's sorted probabilities, [R, K, k] each, and the positions both have."""
    # The teacher's positions are cut, or filled up, to the student's slots.
    found, slots = teacher_of(batch), states.shape[1]
    behind = max(0, slots - found.real.shape[1])
    teacher = jnp.pad(found.features, ((0, 0), (0, behind), (0, 0)))[:, :slots]
    real = jnp.pad(found.real, ((0, 0), (0, behind)))[:, :slots]
    student = top_probabilities(config, params, states, found.features.shape[2], compute)
    return student, teacher, real & (batch.pair >= 0)


def teacher_of(batch: Batch) -> TeacherTokens:
    assert batch.teacher is not None  # the stage lays it beside every batch
    return batch.teacher


# ------------------------------------------------------------------------------------------------ projectors


def projector_shapes(student: DecoderConfig, teacher: DecoderConfig) -> Params:
    """What DSKD trains beside the student, as jax.ShapeDtypeStruct: matrices [out, in], float32."""
    d1, d2 = student.hidden_size, teacher.hidden_size
    sizes = {"query": (2 * d2, 2 * d1), "student_to_teacher": (d2, d1), "teacher_to_student": (d1, d2)}
    return {name: {"weight": jax.ShapeDtypeStruct(size, jnp.float32)} for name, size in sizes.items()}


def init_projectors(shapes: Params, key: jax.Array) -> Params:
    """Draw them uniformly in +-1/sqrt(in)."""

    def draw(leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        bound = leaf.shape[1] ** -0.5
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [draw(leaf, one) for leaf, one in zip(leaves, jax.random.split(key, len(leaves)))])
