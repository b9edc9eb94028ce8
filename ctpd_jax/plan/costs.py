"""What a program has to compute and to move, counted on its jaxpr, every loop as often as it turns.

XLA's own cost analysis counts the body of a loop once. Here the matrix products and the kernels are counted, and what
lies between them is taken as fused into them, as a roofline wants it. A kernel counts its whole grid, also the blocks
that its mask lets it skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Work(NamedTuple):
    """Of one device."""

    flops: float = 0.0  # a multiplication and an addition are two
    memory: float = 0.0  # bytes to and from its memory
    links: float = 0.0  # bytes from other devices

    def __add__(self, other: Any) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Work:
        return Work(*(count * value for value in self))


def work(jaxpr: Any) -> Work:
    """Of a jaxpr, closed or not. A loop of unknown length counts once; of branches the one with the most products."""
    total = Work()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        # Where arithmetic is: products, products by expert, kernels of our own.
        if name == "dot_general":
            total += _product(equation)
        elif name == "ragged_dot_general":  # each row is multiplied with the matrix of its expert
            rows, depth = equation.invars[0].aval.shape
            total += Work(2.0 * rows * depth * equation.outvars[0].aval.shape[-1], _moved(equation))
        elif name == "pallas_call":
            turns = math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
            total += Work(turns * work(params["jaxpr"]).flops, _moved(equation))
        # What holds other programs: a branch of several runs, a loop runs as often as it turns, a call once.
        elif name == "cond":
            total += max((work(branch) for branch in params["branches"]), key=lambda branch: branch.flops)
        else:
            turns = params["length"] if name == "scan" else 1
            total += sum((work(inner) for inner in _inner(params)), Work()).times(turns)
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(entry, "jaxpr", entry), "eqns"):
                yield entry


def _product(equation: Any) -> Work:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return Work(2.0 * depth * math.prod(out.shape), _moved(equation))


def _moved(equation: Any) -> float:
    """Operands are read and results are written once."""
    return float(sum(nbytes(variable.aval) for variable in (*equation.invars, *equation.outvars)))


def nbytes(aval: Any) -> int:
    """Bytes of an abstract array; 0 of what is none, such as a key or a reference."""
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    try:
        return 0 if shape is None else math.prod(shape) * np.dtype(dtype).itemsize
    except TypeError:  # a dtype of JAX's own
        return 0
