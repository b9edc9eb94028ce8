"""What other methods of distillation minimise, on logits and hidden states: ULD, Multi-Level OT and DSKD.

Letters: R responses, T student tokens and U teacher tokens of one, V1 and V2 their vocabularies, k sorted
probabilities, D1 and D2 their widths.

All three compare distributions over two vocabularies that share no order. ULD and Multi-Level OT sort the
probabilities, DSKD carries hidden states from one model's space to the other's. Positions are compared by their number
where they are not attended to: both responses start at position 0. Padding is what `real` does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from ctpd_jax.core.arrays import Number, at_least_float32

LOWEST = 1e-10  # of a probability under the logarithm: the smaller vocabulary's padding is 0


# ------------------------------------------------------------------------------------------------ sorted probabilities


def uld_distance(student_logits: Float[ArrayLike, "T V1"], teacher_logits: Float[ArrayLike, "U V2"]) -> Array:
    """sum_i |p_(i) - q_(i)| of probabilities in descending order, float32 [min(T, U)]: ULD (arXiv 2402.12030).

    The smaller vocabulary is padded with zeros: position by position this is the Wasserstein distance of the two
    distributions where any two different tokens are equally far apart. It lies in [0, 2].

    >>> uld_distance(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])))
    Array([0.5], dtype=float32)
    """
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits)
    shared, entries = min(len(student), len(teacher)), max(student.shape[1], teacher.shape[1])
    p, q = (sorted_probabilities(logits[:shared], entries) for logits in (student, teacher))
    return jnp.abs(p - q).sum(axis=-1)


def sorted_probabilities(logits: Float[ArrayLike, "*N V"], k: int) -> Float[Array, "*N k"]:
    """The k largest of softmax(logits), in descending order; zeros behind them where the vocabulary is smaller."""
    values = at_least_float32(logits)
    # The gradient needs to know where they lie, not how they were found.
    places = lax.top_k(lax.stop_gradient(values), min(k, values.shape[-1]))[1]
    largest = jnp.take_along_axis(values, places, axis=-1)
    found = jnp.exp(largest - jax.nn.logsumexp(values, axis=-1, keepdims=True))
    return jnp.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, k - found.shape[-1])])


def top_distance(student: Float[ArrayLike, "*N k"], teacher: Float[ArrayLike, "*N k"]) -> Float[Array, "*N"]:
    """ULD's distance of two distributions of which the k largest probabilities are known.

        sum_{i<k} |p_(i) - q_(i)| + |sum_{i>=k} p_(i) - sum_{i>=k} q_(i)|

    What lies beyond the k largest is one tail of known mass, 1 less their sum. That is the distance itself where k
    reaches both vocabularies, and else never more than it: the masses of two tails differ by at most what their
    entries do together.
    """
    difference = at_least_float32(student) - at_least_float32(teacher)
    return jnp.abs(difference).sum(axis=-1) + jnp.abs(difference.sum(axis=-1))


def sorted_cross_entropy(student: Float[ArrayLike, "*N k"], teacher: Float[ArrayLike, "*N k"]) -> Float[Array, "*N"]:
    """-sum_{i<k} q_(i) log p_(i) of the k largest, q the teacher's: Multi-Level OT's second cost (arXiv 2412.14528)."""
    p, q = at_least_float32(student), at_least_float32(teacher)
    return -(q * jnp.log(jnp.maximum(p, LOWEST))).sum(axis=-1)


def sinkhorn_distance(
    student: Float[ArrayLike, "R T k"],
    teacher: Float[ArrayLike, "R U k"],
    student_real: Shaped[ArrayLike, "R T"],
    teacher_real: Shaped[ArrayLike, "R U"],
) -> Float[Array, " R"]:
    """sum_tu P_tu C_tu, C_tu = sum_i |p_t(i) - q_u(i)|: Multi-Level OT's cost of whole responses (arXiv 2412.14528).

    P moves the student's positions to the teacher's: exp(-C / 0.1), its rows scaled to 1 / T each and its columns to
    1 / U, ten times in turn (arXiv 1306.0895), so that a longer response does not count more.
    """
    x, y = at_least_float32(student), at_least_float32(teacher)
    rows, columns = jnp.asarray(student_real, bool), jnp.asarray(teacher_real, bool)

    # 1. The costs, entry by entry of the k: [R, T, U] is held, [R, T, U, k] is not, also not for the gradient.
    @jax.checkpoint
    def add(cost: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
        return cost + jnp.abs(entry[0][:, :, None] - entry[1][:, None, :]), None

    nothing = jnp.zeros_like(x[:, :, :1] * y[:, None, :, 0])
    cost, _ = lax.scan(add, nothing, (jnp.moveaxis(x, 2, 0), jnp.moveaxis(y, 2, 0)))

    # 2. Scaling a matrix's rows and columns is scaling two vectors. Costs are at most 2, so nothing underflows.
    kernel = jnp.where(rows[:, :, None] & columns[:, None, :], jnp.exp(-cost / 0.1), 0)
    counts = (real.sum(axis=1, keepdims=True, dtype=cost.dtype) for real in (rows, columns))
    share = [1 / jnp.maximum(count, 1) for count in counts]

    def scale(vectors: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        of_rows = share[0] / jnp.where(rows, jnp.einsum("rtu,ru->rt", kernel, vectors[1], precision="highest"), 1)
        total = jnp.einsum("rtu,rt->ru", kernel, of_rows, precision="highest")
        return (of_rows, share[1] / jnp.where(columns, total, 1)), None

    start = jnp.ones_like(cost[:, :, 0]), jnp.ones_like(cost[:, 0, :])
    (of_rows, of_columns), _ = lax.scan(scale, start, None, length=10)
    return (of_rows[:, :, None] * kernel * of_columns[:, None, :] * cost).sum(axis=(1, 2))


# ------------------------------------------------------------------------------------------------ dual spaces


class Space(NamedTuple):
    """One model's view of responses, N its tokens, D its width."""

    hidden: Array  # [R, N, D]: the state that predicts each token
    inputs: Array  # [R, N, D]: the embedding of the token before, on which that state stands
    targets: Array  # [R, N, D]: the embedding of the token itself
    ids: Array  # int [R, N]: the token itself
    real: Array  # bool [R, N]
    head: Array  # [V, D]
    softcap: float | None = None  # of the head's logits

    def logits(self, states: Array, head: Array) -> Array:
        found = _product("rnd,vd->rnv", states, head)
        return found if self.softcap is None else self.softcap * jnp.tanh(found / self.softcap)


class Projectors(NamedTuple):
    """What DSKD trains beside the student: matrices [out, in]."""

    query: Array  # [2 D2, 2 D1]
    student_to_teacher: Array  # [D2, D1]
    teacher_to_student: Array  # [D1, D2]


def dual_space_terms(
    student: Space, teacher: Space, projectors: Projectors, temperature: Number = 2.0, chunk: int | None = None
) -> dict[str, Float[Array, " R"]]:
    """DSKD with cross-model attention (arXiv 2406.17328), each term the mean over a response's tokens.

    Both models' tokens, seen as [input; target] embeddings, attend to each other: A = Q K^T / sqrt(2 D2), Q the
    student's, projected, K the teacher's. With h and g the student's and the teacher's hidden states,

        t2s = softmax(A) P_ts (g + e_target)         through the student's head
        s2t = softmax(A^T) P_st h                    through the teacher's head

    - `t2s`: -log softmax(t2s logits)[target], what trains the projectors;
    - `student`: KL(t2s || student) at the temperature, where t2s is right; t2s and the head are constants there;
    - `teacher`: KL(teacher || s2t) at the temperature.

    The teacher's embeddings and states are divided by their standard deviation within the response. `chunk` positions
    of all responses meet a vocabulary at once, and again in the backward pass; None: all.
    """
    # 1. Who attends to whom. The embeddings are constants: only projectors and the hidden states are to learn.
    q = jnp.concatenate([student.inputs, student.targets], axis=-1)
    k = _over_deviation(jnp.concatenate([teacher.inputs, teacher.targets], axis=-1), teacher.real)
    projected = _product("rtd,ed->rte", lax.stop_gradient(q), projectors.query)
    attention = _product("rte,rue->rtu", projected, lax.stop_gradient(k)) / k.shape[-1] ** 0.5
    of_student = _attend(attention, teacher.real[:, None, :])
    of_teacher = _attend(attention.swapaxes(1, 2), student.real[:, None, :])

    # 2. Each model's states in the other's space.
    g = _over_deviation(teacher.hidden, teacher.real) + _over_deviation(teacher.targets, teacher.real)
    to_student = _product("rud,ed->rue", lax.stop_gradient(g), projectors.teacher_to_student)
    to_teacher = _product("rtd,ed->rte", student.hidden, projectors.student_to_teacher)
    t2s = _product("rtu,rud->rtd", of_student, to_student)
    s2t = _product("rut,rtd->rud", of_teacher, to_teacher)

    # 3. Through the heads, some positions at a time.
    def on_student(t2s: Array, hidden: Array, ids: Array) -> tuple[Array, Array]:
        guide = student.logits(t2s, lax.stop_gradient(student.head))
        own = student.logits(hidden, student.head)
        wrong = -jnp.take_along_axis(jax.nn.log_softmax(guide), ids[..., None], axis=-1)[..., 0]
        right = guide.argmax(axis=-1) == ids
        return wrong, right * divergence(lax.stop_gradient(guide), own, temperature)

    def on_teacher(hidden: Array, s2t: Array) -> Array:
        head = lax.stop_gradient(teacher.head)
        return divergence(teacher.logits(lax.stop_gradient(hidden), head), teacher.logits(s2t, head), temperature)

    wrong, apart = by_chunks(on_student, chunk, t2s, student.hidden, student.ids)
    far = by_chunks(on_teacher, chunk, teacher.hidden, s2t)
    terms = {"t2s": (wrong, student.real), "student": (apart, student.real), "teacher": (far, teacher.real)}
    return {name: mean_over(*term) for name, term in terms.items()}


def divergence(
    truth: Float[ArrayLike, "*N V"], logits: Float[ArrayLike, "*N V"], temperature: Number = 1.0
) -> Float[Array, "*N"]:
    """KL(softmax(truth / temperature) || softmax(logits / temperature)), nats; not times the temperature's square."""
    p, q = (jax.nn.log_softmax(at_least_float32(each) / temperature) for each in (truth, logits))
    return (jnp.exp(p) * (p - q)).sum(axis=-1)


def mean_over(values: Shaped[ArrayLike, "R N"], real: Shaped[ArrayLike, "R N"]) -> Float[Array, " R"]:
    """Mean of each row's values where `real`; 0 for a row without any. Other values do not matter, NaN included."""
    counted = jnp.asarray(real, bool)
    total = jnp.where(counted, at_least_float32(values), 0).sum(axis=1)
    return total / jnp.maximum(counted.sum(axis=1, dtype=total.dtype), 1)


def by_chunks(function: Callable[..., Any], chunk: int | None, *arrays: Array) -> Any:
    """function(*arrays), arrays [R, N, ...], results [R, N, ...], over `chunk` of the N at a time.

    What a chunk needs on the way is computed anew for the gradient: memory is that of one chunk.
    """
    positions = arrays[0].shape[1]
    if chunk is None or chunk >= positions:
        return jax.checkpoint(function)(*arrays)
    count = -(-positions // chunk)

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, count * chunk - positions)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(len(array), count, chunk, *array.shape[2:]), 1, 0)

    def together(array: Array) -> Array:
        whole = jnp.moveaxis(array, 0, 1)
        return whole.reshape(len(whole), count * chunk, *whole.shape[3:])[:, :positions]

    found = lax.map(lambda parts: jax.checkpoint(function)(*parts), tuple(map(cut, arrays)))
    return jax.tree.map(together, found)


def _product(equation: str, first: Array, second: Array) -> Array:
    """A product accumulated in float32; float32 operands are not rounded, which TPUs would do."""
    dtype = jnp.promote_types(first.dtype, second.dtype)
    precision = lax.Precision.HIGHEST if dtype.itemsize >= 4 else None
    wide = jnp.promote_types(jnp.float32, dtype)
    return jnp.einsum(equation, first, second, precision=precision, preferred_element_type=wide)


def _attend(attention: Array, real: Array) -> Array:
    """Softmax over the last axis where `real`; padding is never attended to."""
    return jax.nn.softmax(jnp.where(real, attention, -1e30), axis=-1)


def _over_deviation(states: Array, real: Array) -> Array:
    """States [R, N, D] over the standard deviation of all the real entries of a response."""
    values, counted = at_least_float32(states), jnp.asarray(real, bool)[..., None]
    count = jnp.maximum(counted.sum(axis=(1, 2), keepdims=True, dtype=values.dtype) * values.shape[-1], 1)
    mean = jnp.where(counted, values, 0).sum(axis=(1, 2), keepdims=True) / count
    variance = jnp.where(counted, jnp.square(values - mean), 0).sum(axis=(1, 2), keepdims=True) / count
    return values / jnp.sqrt(jnp.maximum(variance, 1e-12))
