"""token_logprobs: the numbers of the plain log-softmax, whatever the block, and never more than a block of logits."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.core import logprobs
from ctpd_jax.core.logprobs import token_logprobs


def plain(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, softcap: float | None = None) -> jax.Array:
    logits = jnp.einsum("...d,vd->...v", hidden, unembedding, precision="highest")
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def case(lead: tuple[int, ...], width: int, vocabulary: int, dtype: str = "float32", seed: int = 0):
    rng = np.random.RandomState(seed)
    hidden = jnp.asarray(rng.standard_normal((*lead, width)), dtype)
    unembedding = jnp.asarray(rng.standard_normal((vocabulary, width)), dtype)
    return hidden, unembedding, jnp.asarray(rng.randint(0, vocabulary, size=lead)), jnp.asarray(rng.randn(*lead), dtype)


@pytest.mark.parametrize(
    "positions, width, vocabulary, chunk, softcap",
    [
        (7, 3, 30, None, None),  # one block
        (7, 3, 30, 1, None),  # ten groups of three rows
        (9, 8, 13, 2, None),  # no divisor fits: rows are added
        (9, 8, 13, 2, 1.5),
        (8, 3, 16, 3, 1.5),
        (5, 1, 2, 1, None),  # more positions than a block of the whole vocabulary: one row a group
        (1, 4, 1, None, None),  # a vocabulary of one token
        (4, 4, 12, 100, 2.0),  # a chunk larger than the input
    ],
)
def test_values_and_gradients_do_not_depend_on_the_block(positions, width, vocabulary, chunk, softcap) -> None:
    with jax.enable_x64(True):
        hidden, unembedding, targets, cotangent = case((positions,), width, vocabulary, "float64")

        @partial(jax.jit, static_argnums=0)
        def value_and_gradients(function, h: jax.Array, w: jax.Array):
            value, vjp = jax.vjp(lambda h, w: function(h, w, targets), h, w)
            return value, *vjp(cotangent)

        ours = value_and_gradients(partial(token_logprobs, chunk=chunk, softcap=softcap), hidden, unembedding)
        theirs = value_and_gradients(partial(plain, softcap=softcap), hidden, unembedding)
        for mine, other in zip(ours, theirs):
            np.testing.assert_allclose(mine, other, rtol=1e-11, atol=1e-12)


def test_leading_axes_jit_and_float32() -> None:
    hidden, unembedding, targets, _ = case((2, 3, 5), 16, 50)
    values = jax.jit(token_logprobs, static_argnames="chunk")(hidden, unembedding, targets, chunk=7)
    assert values.shape == (2, 3, 5) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, plain(hidden, unembedding, targets), rtol=1e-5)


def test_vmap_over_positions_and_over_models() -> None:
    hidden, unembedding, targets, _ = case((3, 4), 8, 21)
    batched = jax.vmap(lambda h, t: token_logprobs(h, unembedding, t, 2))(hidden, targets)
    np.testing.assert_allclose(batched, token_logprobs(hidden, unembedding, targets), rtol=1e-5)
    models = jnp.stack([unembedding, -unembedding, 2 * unembedding])
    gradient = jax.vmap(jax.grad(lambda w, h, t: token_logprobs(h, w, t, 2).sum()))(models, hidden, targets)
    for i in range(3):
        expected = jax.grad(lambda w, i=i: plain(hidden[i], w, targets[i]).sum())(models[i])
        np.testing.assert_allclose(gradient[i], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_operands_are_accumulated_in_float32() -> None:
    hidden, unembedding, targets, cotangent = case((6,), 64, 40, "bfloat16")
    wide = [x.astype(jnp.float32) for x in (hidden, unembedding)]
    values, vjp = jax.vjp(lambda h, w: token_logprobs(h, w, targets, 2), hidden, unembedding)
    assert values.dtype == jnp.float32
    # The products of bfloat16 numbers are exact in float32: rounding the logits to bfloat16 would cost 1e-2 here.
    np.testing.assert_allclose(values, plain(*wide, targets), rtol=1e-5, atol=1e-5)
    expected_gradients = jax.vjp(lambda h, w: plain(h, w, targets), *wide)[1](cotangent.astype(jnp.float32))
    for ours, expected in zip(vjp(cotangent.astype(jnp.float32)), expected_gradients):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0.03, atol=0.05)


def test_mixed_operands_use_the_wider_type() -> None:
    hidden, unembedding, targets, _ = case((4,), 8, 10)
    low = hidden.astype(jnp.bfloat16)
    expected = plain(low.astype(jnp.float32), unembedding, targets)
    np.testing.assert_allclose(token_logprobs(low, unembedding, targets), expected, rtol=1e-5)
    gradients = jax.grad(lambda h, w: token_logprobs(h, w, targets).sum(), (0, 1))(low, unembedding)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


def test_large_logits_do_not_overflow() -> None:
    hidden, unembedding, targets, _ = case((5,), 8, 12)
    values, gradient = jax.value_and_grad(lambda h: token_logprobs(h, unembedding, targets, 1).sum())(1e4 * hidden)
    expected = jax.value_and_grad(lambda h: plain(h, unembedding, targets).sum())(1e4 * hidden)
    np.testing.assert_allclose(values, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-4)


def test_probabilities_sum_to_one() -> None:
    hidden, unembedding, _, _ = case((4,), 8, 17)
    every = jnp.broadcast_to(jnp.arange(17), (4, 17))
    repeated = jnp.broadcast_to(hidden[:, None], (4, 17, 8))
    np.testing.assert_allclose(jnp.exp(token_logprobs(repeated, unembedding, every, 3)).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("target", [-1, 10, 11, 12, 2**30])
def test_a_target_outside_the_vocabulary_gives_nan_there_only(target: int) -> None:
    hidden, unembedding, targets, _ = case((3,), 4, 10)
    values = token_logprobs(hidden, unembedding, targets.at[1].set(target), chunk=1)  # 3 groups of 4: 2 rows of padding
    assert np.isnan(values[1]) and np.isfinite(values[jnp.array([0, 2])]).all()


def test_no_positions() -> None:
    hidden, unembedding, targets, _ = case((0,), 4, 10)
    assert token_logprobs(hidden, unembedding, targets).shape == (0,)


def test_precision_is_explicit() -> None:
    hidden, unembedding, targets, _ = case((4,), 8, 10)

    def precisions(*operands: jax.Array, **options: str) -> set[str]:
        def total(h: jax.Array, w: jax.Array) -> jax.Array:
            return token_logprobs(h, w, targets, **options).sum()

        text = jax.jit(jax.grad(total, (0, 1))).lower(*operands).as_text()
        return set(re.findall(r"dot_general.*?precision = \[(\w+), \w+\]", text)) | (
            {"DEFAULT"} if re.search(r"dot_general(?!.*precision)", text) else set()
        )

    assert precisions(hidden, unembedding) == {"HIGHEST"}
    assert precisions(hidden, unembedding, precision="default") == {"DEFAULT"}
    low = [x.astype(jnp.bfloat16) for x in (hidden, unembedding)]
    assert precisions(*low) == {"DEFAULT"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((4, 8), (10, 7), (4,)), "unembedding"),
        (((4, 8), (8,), (4,)), "unembedding"),
        (((4, 8), (10, 8), (5,)), "one target"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message, unchecked) -> None:
    h, w, t = arguments
    with pytest.raises(ValueError, match=message):
        token_logprobs(jnp.zeros(h), jnp.zeros(w), jnp.zeros(t, int))


def test_options_that_make_no_sense_are_refused(unchecked) -> None:
    hidden, unembedding, targets, _ = case((4,), 8, 10)
    with pytest.raises(ValueError, match="chunk >= 1"):
        token_logprobs(hidden, unembedding, targets, chunk=0)
    with pytest.raises(ValueError, match="softcap > 0"):
        token_logprobs(hidden, unembedding, targets, softcap=0.0)
    with pytest.raises(ValueError, match="integer targets"):
        token_logprobs(hidden, unembedding, targets * 1.0)


# ------------------------------------------------------------------------------------------------ memory


@settings(max_examples=200, deadline=None)
@given(positions=st.integers(1, 10**6), vocabulary=st.integers(1, 300_000), chunk=st.none() | st.integers(1, 10**5))
def test_a_block_is_never_larger_than_chunk_rows_of_logits(positions, vocabulary, chunk) -> None:
    groups = logprobs.number_of_groups(positions, vocabulary, chunk)
    assert 1 <= groups <= vocabulary
    columns = math.ceil(vocabulary / groups)
    bound = (chunk or max(1, logprobs.BLOCK_BYTES // (4 * vocabulary))) * vocabulary
    # Rounding the vocabulary up to whole groups adds at most one column.
    assert positions * (columns - 1) < max(bound, 1) or groups == vocabulary
    assert groups <= 2 * math.ceil(positions / (chunk or max(1, logprobs.BLOCK_BYTES // (4 * vocabulary))))


def test_default_block_is_64_megabytes() -> None:
    groups = logprobs.number_of_groups(512, 262_144, None)
    assert 512 * 262_144 // groups * 4 <= 64 * 2**20 < 512 * 262_144 // (groups - 1) * 4


@pytest.mark.parametrize("vocabulary", [1024, 1009])  # divides into groups; is prime, so that rows are added
def test_compiled_gradient_holds_one_block_of_logits(vocabulary: int) -> None:
    """No array of the compiled program is larger than a block, but for the unembedding, its gradient and the inputs."""
    positions, width, chunk = 256, 6, 16
    hidden, unembedding, targets, _ = case((4, positions // 4), width, vocabulary)

    def total(h: jax.Array, w: jax.Array) -> jax.Array:
        return token_logprobs(h, w, targets, chunk).sum()

    compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(hidden, unembedding).compile()
    found = re.findall(r"\b(?:f|bf|pred|s|u)\d*\[([\d,]+)\]", compiled.as_text())
    shapes = {tuple(int(n) for n in dims.split(",")) for dims in found}
    block = chunk * vocabulary
    groups = logprobs.number_of_groups(positions, vocabulary, chunk)
    padded = -(-vocabulary // groups)
    assert (positions, padded) in shapes, "the blocks are not found: the test reads the program wrongly"
    assert block < positions * vocabulary / 8
    assert max(math.prod(s) for s in shapes) <= max(positions * padded, padded * groups * width)
    for shape in shapes:
        rows = math.prod(shape) // vocabulary if vocabulary in shape else 0
        assert rows <= max(chunk, width), f"{shape} has the vocabulary and more rows than a chunk"
    # Beside its inputs and outputs the program holds a few blocks' worth at most (logits, their gradient), plus the
    # padded unembedding and its gradient where the vocabulary does not divide.
    padding_copies = 0 if vocabulary % groups == 0 else 2 * padded * groups * width * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * positions * padded * 4 + padding_copies + 2**17


def test_gradient_of_the_hidden_states_alone_skips_the_unembedding() -> None:
    hidden, unembedding, targets, _ = case((64,), 6, 1024)

    def memory(argnums: int | tuple[int, ...]) -> int:
        gradient = jax.grad(lambda h, w: token_logprobs(h, w, targets, 4).sum(), argnums)
        analysis = jax.jit(gradient).lower(hidden, unembedding).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    assert memory(0) + unembedding.nbytes <= memory((0, 1))
