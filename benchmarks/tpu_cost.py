"""How long the compiler for TPUs thinks that a layer, the head and a training step take; no TPU is needed, only libtpu.

    pip install -e '.[tpu]'
    python benchmarks/tpu_cost.py --chip v5e --model 8b --part layer       # about a minute
    python benchmarks/tpu_cost.py --json tpu_cost.json                     # three chips, two models, three parts
    python benchmarks/tpu_cost.py --part step --tokens 1x1024 --remat dots

The optimised program carries estimated cycles for every operation. They are summed, the body of a loop as often as it
turns, and divided by the chip's clock. Kernels (splash attention) have no estimate: their arithmetic is counted and put
at the peak rate, which is too good for them. What the estimate does not know: waiting for other chips, and for memory
where several operations want it at once. It is for finding what is worth mending, not for promises; how far it is off
for one plain product and for one pass over memory is printed first.

layer  a stack of two under the scan and the rematerialisation of training, its gradient added, divided by two
head   log-probabilities of all tokens and their gradient, float32 unembedding
step   the program that adds a micro-batch to the gradient, on the smallest slice where it fits by arithmetic

All with float32 parameters and bfloat16 products, --tokens for each chip. "useful" is 6 FLOPs for each token and
parameter of a matrix, "done" is what the program multiplies, recomputation included, both at the peak rate. "once" is
what lies outside all loops, such as the cast of all weights and zeros for all gradients: under `fsdp` it is divided by
the chips, while what a layer costs in the loop is not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from timing import write
from tpu_text import Operation, operations

from ctpd_jax.plan.chips import CHIPS, devices_of, has_compiler, parse_topology, quiet_compiler

CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # cycles a second; peak FLOPs are a whole number of each
MODELS = {"8b": "meta-llama/Llama-3.1-8B", "1b": "meta-llama/Llama-3.2-1B"}
PARTS = ("layer", "head", "step")
SLICES = {"v5e": ("1x1", "2x2", "2x4", "4x4", "4x8"), "v6e": ("1x1", "2x2", "2x4", "4x4"), "v5p": ("2x2x1", "2x2x2")}
LAYERS = 2  # of the stack: the fewest that stay a loop
TOP = 8  # operations that are named


# ------------------------------------------------------------------------------------------------ the programs


@dataclass(frozen=True)
class Case:
    traced: Any
    counted: Any  # the jaxpr of one chip's share, in which its arithmetic is counted
    useful: float  # FLOPs of a chip
    parts: int = 1  # figures are divided by it
    links: float = 0.0  # bytes that a chip receives
    where: str = ""


def layer_case(model: str, mesh: Any, rows: int, length: int, remat: str) -> Case:
    import jax
    import jax.numpy as jnp

    from ctpd_jax.models.adding import add_gradient
    from ctpd_jax.models.attention_backends import choose_backend
    from ctpd_jax.models.decoder import hidden_states, param_shapes
    from ctpd_jax.plan.programs import abstract_batch
    from ctpd_jax.sharding import replicated, shard_shapes

    whole = decoder_of(model)
    decoder = replace(whole, num_layers=LAYERS, layer_kinds=whole.layer_kinds[:LAYERS], vocab_size=256)
    params = shard_shapes(mesh, param_shapes(decoder))
    batch = abstract_batch(mesh, shape_of(rows, length), rows)
    backend = choose_backend("auto", decoder, "bfloat16", False, "tpu")
    cotangent = jax.ShapeDtypeStruct((rows, length, decoder.hidden_size), jnp.bfloat16, sharding=replicated(mesh))

    @partial(jax.jit, donate_argnums=1)
    def gradient(params: Any, earlier: Any, batch: Any, cotangent: Any) -> Any:
        def loss(params: Any) -> Any:
            found = hidden_states(decoder, params, batch.tokens, batch.layout, remat, jnp.bfloat16, backend, mesh)
            return jnp.vdot(found.astype(jnp.float32), cotangent), None

        return add_gradient(loss, params, earlier, layers=True)[0]

    traced = gradient.trace(params, params, batch, cotangent)
    return Case(traced, traced.jaxpr, 6.0 * rows * length * matrices(params["model"]["layers"]), LAYERS)


def head_case(model: str, mesh: Any, rows: int, length: int, remat: str) -> Case:
    import jax
    import jax.numpy as jnp

    from ctpd_jax.models.compute import Compute, logprobs_of
    from ctpd_jax.plan.programs import abstract_batch
    from ctpd_jax.sharding import replicated

    decoder = decoder_of(model)
    matrix = (decoder.vocab_size, decoder.hidden_size)
    table = jax.ShapeDtypeStruct(matrix, jnp.float32, sharding=replicated(mesh))
    states = jax.ShapeDtypeStruct((rows, length, decoder.hidden_size), jnp.bfloat16, sharding=replicated(mesh))
    batch, compute = abstract_batch(mesh, shape_of(rows, length), rows), Compute("bfloat16", mesh=mesh)

    def gradient(table: Any, states: Any, batch: Any) -> Any:
        def total(table: Any, states: Any) -> Any:
            params = {"lm_head": {"weight": table}, "model": {"embed_tokens": {"weight": table}}}
            return logprobs_of(decoder, params, states, batch, compute).sum()

        return jax.grad(total, (0, 1))(table, states)

    traced = jax.jit(gradient).trace(table, states, batch)
    return Case(traced, traced.jaxpr, 6.0 * rows * length * table.size)


def step_case(model: str, chip: str, rows: int, length: int, remat: str) -> Case:
    """The first slice where it fits by estimate; all chips are one axis `fsdp`, as in the configs."""
    from ctpd_jax.plan.planner import estimate, over_links
    from ctpd_jax.plan.programs import decoders, plan_stage
    from ctpd_jax.settings import paper_on_tpu
    from ctpd_jax.sharding import make_mesh

    for grid in SLICES[chip]:
        topology = parse_topology(f"{chip}:{grid}")
        devices, every = devices_of(topology), rows * topology.count
        config = paper_on_tpu("", MODELS[model], micro_batch=every, layout="response")
        config.train.batch_size, config.student.remat = every, remat
        bases, mesh = decoders(config, "train"), make_mesh(config.mesh, devices)
        stage = plan_stage(config, "train", bases, mesh, shape_of(every, length))
        program = stage.programs[0]  # accumulate
        if estimate(stage, program).total <= topology.chip.memory:
            break
    else:
        raise SystemExit(f"A step of {MODELS[model]} fits none of {', '.join(SLICES[chip])} of {chip}.")
    # On one device with that device's share of the rows: the arithmetic of a chip.
    alone = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices[:1])
    own = plan_stage(config, "train", bases, alone, shape_of(rows, length)).programs[0]
    decoder = bases["student"]
    looked_up = 0 if decoder.tied else decoder.vocab_size * decoder.hidden_size
    useful = 6.0 * rows * length * (program.parameters - looked_up)
    return Case(program.traced, own.traced.jaxpr, useful, 1, over_links(stage, program), topology.name)


def decoder_of(model: str) -> Any:
    from ctpd_jax.models.hf.config import from_hf
    from ctpd_jax.plan.programs import KNOWN_MODELS

    return from_hf(json.loads(KNOWN_MODELS.read_text(encoding="utf-8"))[MODELS[model]], where=model)


def shape_of(rows: int, length: int) -> Any:
    from ctpd_jax.data.rows import BatchShape

    return BatchShape(rows, length, length)


def matrices(layers: Any) -> int:
    """Parameters of stacked layers that a token is multiplied with: all but norms and biases."""
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layers) if len(leaf.shape) > 2)


def one_chip(chip: str) -> Any:
    from ctpd_jax.sharding import make_mesh

    devices = devices_of(parse_topology(f"{chip}:{SLICES[chip][0]}"))
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices[:1])


# ------------------------------------------------------------------------------------------------ figures


def kernel_flops(jaxpr: Any) -> float:
    """FLOPs of the kernels in a jaxpr, counted as `plan.costs` counts them: blocks that a mask skips are in it."""
    import jax

    from ctpd_jax.plan.costs import work

    def is_program(entry: Any) -> bool:
        return hasattr(getattr(entry, "jaxpr", entry), "eqns")

    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        inner = [entry for entry in jax.tree.leaves(params, is_leaf=is_program) if is_program(entry)]
        if name == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * work(params["jaxpr"]).flops
        elif name == "cond":
            total += max(map(kernel_flops, inner), default=0.0)
        else:
            total += sum(map(kernel_flops, inner)) * (params["length"] if name == "scan" else 1)
    return total


def calibration(chip: str) -> dict[str, float]:
    """What the estimate says of one plain product and of one pass over memory, against the peak rates."""
    import jax
    import jax.numpy as jnp

    from ctpd_jax.sharding import replicated

    mesh, size = one_chip(chip), 8192
    square = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=replicated(mesh))
    wide = jax.ShapeDtypeStruct((2 * size, size), jnp.float32, sharding=replicated(mesh))
    product, addition = (
        sum(one.cycles for one in compiled(traced)) / CLOCK[chip]
        for traced in (jax.jit(jnp.matmul).trace(square, square), jax.jit(lambda x: x + 1).trace(wide))
    )
    return {
        "product": product * CHIPS[chip].flops / (2 * size**3),
        "memory": addition * CHIPS[chip].bandwidth / (8 * wide.size),
    }


def compiled(traced: Any) -> list[Operation]:
    return list(operations(traced.lower(lowering_platforms=("tpu",)).compile().as_text()))


def measure(chip: str, model: str, part: str, rows: int, length: int, remat: str) -> dict[str, Any]:
    """Milliseconds of one case, and what costs most in it beside products."""
    from ctpd_jax.plan.costs import work

    if part == "step":
        case = step_case(model, chip, rows, length, remat)
    else:
        case = {"layer": layer_case, "head": head_case}[part](model, one_chip(chip), rows, length, remat)
    found = compiled(case.traced)
    rate = CHIPS[chip].flops * case.parts / 1e3  # FLOPs in a millisecond
    per_ms = CLOCK[chip] * case.parts / 1e3
    kernels = kernel_flops(case.counted)
    figures = {
        "estimate": sum(one.cycles for one in found) / per_ms,
        "products": sum(one.cycles for one in found if one.product) / per_ms,
        "once": sum(one.cycles for one in found if one.turns == 1) / per_ms,
        "kernels": kernels / rate,
        "useful": case.useful / rate,
        "done": (work(case.counted).flops - kernels) / rate,
        "links": case.links / CHIPS[chip].links * 1e3 / case.parts,
    }
    beside: Counter[str] = Counter()
    for one in found:
        if not one.product:
            beside[f"{one.what:34} x{one.turns:<5} {one.source}"] += one.cycles
    return {
        "chip": case.where or chip,
        "model": model,
        "part": part,
        "milliseconds": figures,
        "estimate_to_useful": figures["estimate"] / figures["useful"],
        "estimate_to_done": figures["estimate"] / figures["done"],
        "utilisation": figures["useful"] / (figures["estimate"] + figures["kernels"]),
        "beside_products": {name: cycles / per_ms for name, cycles in beside.most_common(TOP)},
    }


FIGURES = ("estimate", "products", "once", "kernels", "useful", "done", "links")
HEADER = f"{'':22}" + "".join(f"{name:>9}" for name in (*FIGURES, "/ useful", "/ done")) + "  utilisation"


def row(case: dict[str, Any]) -> str:
    values = [case["milliseconds"][name] for name in FIGURES] + [case["estimate_to_useful"], case["estimate_to_done"]]
    name = f"{case['chip']:9} {case['model']:4} {case['part']:7}"
    return name + "".join(f"{value:9.2f}" for value in values) + f"{100 * case['utilisation']:11.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CLOCK, nargs="+", default=list(CLOCK))
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--tokens", default="2x1024", help="rows x length of each chip (2x1024)")
    parser.add_argument("--remat", choices=("full", "dots", "none"), default="full", help="as config.student.remat")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    if not has_compiler():
        parser.error("libtpu is not installed: pip install -e '.[tpu]'")
    quiet_compiler()
    rows, length = map(int, arguments.tokens.split("x"))

    calibrated, cases = {}, []
    for chip in arguments.chip:
        calibrated[chip] = calibration(chip)
        told = "{product:.2f} x its bound at the peak, one pass over memory {memory:.2f} x".format(**calibrated[chip])
        print(f"{chip}: by the estimate one plain product takes {told}", flush=True)
    print(f"\nmilliseconds, {arguments.tokens} tokens a chip, remat {arguments.remat}\n{HEADER}", flush=True)
    for chip, model, part in itertools.product(arguments.chip, arguments.model, arguments.part):
        cases.append(measure(chip, model, part, rows, length, arguments.remat))
        print(row(cases[-1]), flush=True)
        write(arguments.json, "tpu_cost", tokens=arguments.tokens, remat=arguments.remat, calibration=calibrated,
              cases=cases)  # fmt: skip
    for case in cases:
        print(f"\n{case['chip']} {case['model']} {case['part']}: beside products, milliseconds")
        for name, ms in case["beside_products"].items():
            print(f"  {ms:8.2f}  {name}")


if __name__ == "__main__":
    main()
