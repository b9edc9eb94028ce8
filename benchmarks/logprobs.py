"""What the log-probabilities of the targets cost, forward and with their gradient, against the plain way.

    python benchmarks/logprobs.py
    python benchmarks/logprobs.py --positions 1024 --width 576 --json logprobs.json

The plain way makes all logits [positions, vocabulary], in float32, and lets JAX differentiate log_softmax. Ours never
holds more than 64 MB of logits. The bytes are the compiler's own: what a program needs beside arguments and results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import ROUNDS, alternate, matmul_gflops, medians, write

from ctpd_jax.core.logprobs import token_logprobs

VOCABULARIES = {"SmolLM2": 49_152, "Qwen2.5": 151_936, "Gemma 3": 262_144}


def plain_logprobs(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
    """All logits at once: what most training code does."""
    logits = jnp.einsum("nd,vd->nv", hidden, unembedding, precision=jax.lax.Precision.HIGHEST)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]


def measure(name: str, vocabulary: int, positions: int, width: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(positions, width)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(vocabulary, width)) / np.sqrt(width), jnp.float32)
    targets = jnp.asarray(rng.integers(vocabulary, size=positions), jnp.int32)
    record: dict[str, Any] = {"vocabulary": vocabulary, "of": name}
    sides, programs = {}, {}
    for way, function in (("ours", token_logprobs), ("plain", plain_logprobs)):
        summed = jax.value_and_grad(lambda h, u, t, f=function: f(h, u, t).sum(), argnums=(0, 1))
        for what, called in (("forward", function), ("gradient", summed)):
            programs[way, what] = jax.jit(called).lower(hidden, unembedding, targets).compile()
            run = programs[way, what]
            sides[f"{way} {what}"] = lambda run=run: jax.block_until_ready(run(hidden, unembedding, targets))
    seconds = medians(alternate(sides, rounds))
    products = 2 * positions * vocabulary * width  # FLOPs of one product; the gradient needs two more
    for (way, what), program in programs.items():
        own = seconds[f"{way} {what}"]
        record[f"{way} {what}"] = {
            "seconds": own,
            "gflops": products * (1 if what == "forward" else 3) / own / 1e9,
            "megabytes": program.memory_analysis().temp_size_in_bytes / 1e6,
        }
    return record


def table(records: list[dict[str, Any]]) -> str:
    lines = [f"{'vocabulary':>20} {'':10} {'ours':>28}   {'plain':>28}   times as fast"]
    for record in records:
        for what in ("forward", "gradient"):
            ours, plain = (record[f"{way} {what}"] for way in ("ours", "plain"))
            cells = [
                f"{own['seconds']:6.2f} s {own['gflops']:4.0f} GFLOP/s {own['megabytes']:6.0f} MB"
                for own in (ours, plain)
            ]
            label = f"{record['of']} {record['vocabulary']:,}"
            lines.append(
                f"{label:>20} {what:10} {cells[0]:>28}   {cells[1]:>28}   {plain['seconds'] / ours['seconds']:.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=1024, help="scored tokens")
    parser.add_argument("--width", type=int, default=576, help="of the model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there too")
    args = parser.parse_args()
    rate = matmul_gflops()
    records = [measure(*item, args.positions, args.width, args.rounds) for item in VOCABULARIES.items()]
    print(f"{args.positions:,} positions of width {args.width}; products alone run at {rate:.0f} GFLOP/s.")
    print("GFLOP/s count what has to be multiplied: one product forward, three with the gradient.")
    print(table(records))
    write(args.json, "logprobs", matmul_gflops=rate, records=records, positions=args.positions, width=args.width)


if __name__ == "__main__":
    main()
