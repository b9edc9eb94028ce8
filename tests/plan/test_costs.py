"""The counting of products and bytes, against arithmetic by hand."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ctpd_jax.plan.costs import Work, work

A, B, C = 6, 10, 14
LEFT, RIGHT = jax.ShapeDtypeStruct((A, B), jnp.float32), jax.ShapeDtypeStruct((B, C), jnp.bfloat16)
ONE = 2.0 * A * B * C  # operations of LEFT @ RIGHT
BYTES = 4.0 * A * B + 2 * B * C + 4 * A * C


def counted(function, *arguments) -> Work:
    return work(jax.jit(function).trace(*arguments).jaxpr)


def product(left, right):
    return jnp.einsum("ab,bc->ac", left, right, preferred_element_type=jnp.float32)


def test_one_product():
    assert counted(lambda left, right: jnp.dot(left.astype(jnp.bfloat16), right) * 2 + 1, LEFT, RIGHT).flops == ONE
    found = work(jax.make_jaxpr(lambda left, right: jax.lax.dot(left, right.astype(jnp.float32)))(LEFT, RIGHT))
    assert found == Work(ONE, 4.0 * (A * B + B * C + A * C), 0.0)


def test_a_batched_product():
    left, right = jax.ShapeDtypeStruct((3, A, B), jnp.float32), jax.ShapeDtypeStruct((3, B, C), jnp.float32)
    assert counted(jnp.matmul, left, right).flops == 3 * ONE


def test_a_scan_counts_as_often_as_it_turns():
    def looped(left, right):
        def turn(total, _):
            inner, _ = jax.lax.scan(lambda x, _: (x + jnp.dot(left, right), None), total, None, length=3)
            return inner, None

        return jax.lax.scan(turn, jnp.zeros((A, C)), None, length=5)[0]

    square = jax.ShapeDtypeStruct((B, C), jnp.float32)
    assert counted(looped, LEFT, square) == Work(15 * ONE, 15 * 4.0 * (A * B + B * C + A * C), 0.0)


def test_the_gradient_and_what_is_computed_again():
    def loss(weights, x, policy):
        # sin between the products needs the first product again in the backward pass
        body = jax.checkpoint(lambda w, x: jnp.dot(jnp.sin(jnp.dot(x, w)), w.T), policy=policy, prevent_cse=False)
        return jnp.sum(body(weights, x) ** 2)

    weights = jax.ShapeDtypeStruct((B, C), jnp.float32)

    def flops(policy) -> float:
        return counted(jax.grad(partial(loss, policy=policy), argnums=(0, 1)), weights, LEFT).flops / ONE

    assert flops(jax.checkpoint_policies.everything_saveable) == 6  # two forward, four backward
    assert flops(jax.checkpoint_policies.nothing_saveable) == 7  # and the first product once more


def test_of_branches_the_one_with_most_products():
    def either(left, right, choice):
        return jax.lax.cond(choice, lambda: jnp.dot(left, right), lambda: jnp.zeros((A, C)))

    square = jax.ShapeDtypeStruct((B, C), jnp.float32)
    assert counted(either, LEFT, square, jax.ShapeDtypeStruct((), bool)).flops == ONE


def test_a_kernel_counts_its_grid_and_moves_its_operands_once():
    def kernel(left, right, out):
        out[...] = jnp.dot(left[...], right[...])

    def tiled(left, right):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((32, 24), jnp.float32),
            grid=(4, 3),
            in_specs=[pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))],
            out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
        )(left, right)

    found = counted(tiled, jnp.zeros((32, 16)), jnp.zeros((16, 24)))
    assert found == Work(2.0 * 32 * 16 * 24, 4.0 * (32 * 16 + 16 * 24 + 32 * 24), 0.0)


def test_works_are_added_by_their_parts():
    total = Work(1, 2, 3) + Work(10, 20, 30)
    assert total == Work(11, 22, 33) and total.times(2) == (22, 44, 66)
