"""A gradient that is added to an earlier one inside the backward pass, so that the two never lie beside each other.

`gradient + grad(loss)` holds both: for 8 billion parameters 32 GB more over all chips. But the backward pass goes
through the layers one by one, and can carry the sum. Each layer's weights are taken by `tap` out of a stack that comes
along, `through`, of which nothing is read: going backward, the cotangent of that stack is the sum so far. It begins as
the earlier gradient, at `ended`, and every `tap` adds its layer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


@dataclass
class Adding:
    """What stands for the stacked layers where their gradient is to be added to an earlier one."""

    weights: Tree
    through: Tree  # of the same shapes
    gradient: Tree
    times: int = 0  # that the layers were run


def begun(layers: Tree) -> tuple[Tree, Tree]:
    """Return the weights of the layers, and what comes along with the residual stream: None where nothing is added."""
    return (layers.weights, layers.through) if isinstance(layers, Adding) else (layers, None)


def ended(layers: Tree, x: jax.Array, through: Tree) -> jax.Array:
    """Return the residual stream behind the last layer, where the backward pass begins."""
    if not isinstance(layers, Adding):
        return x
    layers.times += 1
    return _ended(x, through, layers.gradient)


@jax.custom_vjp
def _ended(x: jax.Array, through: Tree, gradient: Tree) -> jax.Array:
    return x


_ended.defvjp(lambda x, through, gradient: (x, gradient), lambda gradient, dx: (dx, gradient, None))


def tap(weights: Tree, through: Tree, number: jax.Array) -> tuple[Tree, Tree]:
    """Return a layer's weights as they are; `number` is its place in the stack."""
    return (weights, None) if through is None else _tap(weights, through, number)


@jax.custom_vjp
def _tap(weights: Tree, through: Tree, number: jax.Array) -> tuple[Tree, Tree]:
    return weights, through


def _tapped(number: jax.Array, cotangents: tuple[Tree, Tree]) -> tuple[None, Tree, None]:
    def add(own: jax.Array, total: jax.Array) -> jax.Array:
        before = jax.lax.dynamic_index_in_dim(total, number, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + own.astype(total.dtype), number, 0)

    return None, jax.tree.map(add, *cotangents), None


_tap.defvjp(lambda weights, through, number: ((weights, through), number), _tapped)


def add_gradient(
    loss: Callable[[Tree], tuple[jax.Array, Tree]], params: Tree, gradient: Tree, layers: bool
) -> tuple[Tree, Tree]:
    """Return gradient + the gradient of the loss, and what the loss returns beside.

    layers: params["model"]["layers"] is a stack of layers that the loss gives to `decoder.hidden_states`, once.
    """
    if not layers:
        (_, beside), new = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(jnp.add, gradient, new), beside

    # The layers' part comes out as the cotangent of `through`, and needs no sum; the rest does.
    def with_layers(tree: Tree, layers: Tree) -> Tree:
        return tree | {"model": tree["model"] | {"layers": layers}}

    def without(tree: Tree) -> Tree:
        return tree | {"model": {name: value for name, value in tree["model"].items() if name != "layers"}}

    stack, earlier = params["model"]["layers"], gradient["model"]["layers"]

    def of_parts(rest: Tree, through: Tree) -> tuple[jax.Array, Tree]:
        adding = Adding(stack, through, earlier)
        found = loss(with_layers(rest, adding))
        if adding.times != 1:
            raise RuntimeError(f"The loss ran the layers {adding.times} times; their gradients are added up for one.")
        return found

    (_, beside), (new, total) = jax.value_and_grad(of_parts, argnums=(0, 1), has_aux=True)(without(params), stack)
    return with_layers(jax.tree.map(jnp.add, without(gradient), new), total), beside
