"""What `ctpd plan` prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from ctpd_jax.data.packing import in_words
from ctpd_jax.errors import UserError
from ctpd_jax.job.table import PLANNED, TRAINED, is_sft, left_out, trained_model
from ctpd_jax.plan.chips import GIB, NETWORK, Topology, devices_of, has_compiler, parse_topology
from ctpd_jax.plan.planner import (
    Candidate,
    Plan,
    candidates,
    make_plan,
    smaller,
    with_settings,
)
from ctpd_jax.plan.programs import Bases, Programs, decoders
from ctpd_jax.sharding import AXES

TRIED = 4  # candidates of a search that are compiled, at most
INSTALL = "pip install 'ctpd-jax[tpu]'"


def plan_command(arguments: argparse.Namespace, config: ConfigDict) -> int:
    """Plans the chosen stages and prints what comes of it. Returns 0 if all of them fit, else 3.

    Raises:
        UserError: a topology or a stage that is none, a model that cannot be found, or what the run would refuse.
    """
    # 1. What is asked, and by whose account it is answered.
    topology = parse_topology(arguments.topology)
    if not 0 < arguments.utilisation <= 1:
        raise UserError(f"--utilisation {arguments.utilisation}: a share of the peak, above 0 and up to 1.")
    if not has_compiler() and not arguments.estimate:
        print(
            f"The compiler for TPUs is not installed, so this is an estimate by arithmetic. {INSTALL}\n"
            "brings the compiler; no TPU is needed for it.\n"
        )
    compiled = has_compiler() and not arguments.estimate
    devices = devices_of(topology)
    if not left_out(config, "propose"):
        print("propose: drawing answers is not planned; the models that rank them read as in annotate.\n")
    # 2. Stage by stage; two that run the same programs are planned once.
    every, planned = True, dict[object, str]()
    for stage in chosen(arguments, config):
        same = planned.setdefault(programs_of(config, stage), stage)
        if same != stage:
            print(f"{stage}: the same programs as {same}.\n")
            continue
        bases = decoders(config, stage)
        if arguments.search:
            plan = search(config, stage, bases, topology, devices, compiled)
        else:
            if compiled:
                say(f"{stage}: compiling for {topology.name}, which can take minutes ...")
            plan = make_plan(config, stage, bases, topology, devices, compiled)
        print("\n".join(described(plan, arguments.utilisation)), flush=True)
        every = every and plan.fits
    return 0 if every else 3


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def programs_of(config: ConfigDict, stage: str) -> object:
    """What decides which programs a stage runs; of `positive` and `negative` it is often the same."""
    if stage == "annotate":
        return stage
    settings = config[stage]
    return (
        trained_model(config, stage), is_sft(config, stage), settings.batch_size, settings.micro_batch,
        settings.lora.to_json(), settings.moments,
    )  # fmt: skip


def chosen(arguments: argparse.Namespace, config: ConfigDict) -> list[str]:
    """The stages to plan: those that were asked for, or all that the config does not leave out."""
    for stage in arguments.stage or ():
        if left_out(config, stage):
            raise UserError(
                f"--stage {stage}: the config leaves it out. To plan it, give --config.{stage}.steps=0"
                + (" and --config.weights.source=dpo." if stage in ("positive", "negative") else ".")
            )
    if arguments.stage:
        return arguments.stage
    for stage in TRAINED:
        if stage not in PLANNED and not left_out(config, stage):
            print(f"{stage}: distillation is not planned, what it takes depends on the teacher's tokens too.\n")
    return [stage for stage in PLANNED if not left_out(config, stage)]


def search(
    config: ConfigDict, stage: str, bases: Bases, topology: Topology, devices: list[Any], compiled: bool
) -> Plan:
    """The fastest mesh and micro-batch that fit, among those that the estimate finds; prints them all.

    Raises:
        UserError: no mesh divides the model, or the run would refuse on every one.
    """
    # 1. All of them by estimate, the best first.
    left = candidates(config, stage, bases, topology, devices)
    print(f"{stage} on {topology.name}, by estimate; those that fit first, then the fastest, then the least over links")
    for one in left:
        verdict = "" if one.memory <= topology.chip.memory else "  too much"
        print(f"  {named(one):52} {one.memory / GIB:7.1f} GiB {one.seconds:9.3f} s{verdict}")
    # 2. The compiler has the last word: the best that it lets through, a few attempts long.
    pairs = config.annotate.pairs_per_shard if stage == "annotate" else config[stage].batch_size
    for _ in range(TRIED):
        one = left.pop(0)
        if compiled:
            say(f"{stage}: compiling {named(one)} ...")
        plan = make_plan(with_settings(config, one.settings), stage, bases, topology, devices, compiled)
        if plan.fits:
            print("\n  " + " ".join(f"--config.{name}={value}" for name, value in one.settings.items()) + "\n")
            break
        if compiled:
            print(f"  {named(one)}: does not fit, {plan.largest / GIB:.1f} GiB")
        less = smaller(one, stage, pairs)
        left = ([less] if less and one.memory <= topology.chip.memory else []) + left
        if not left:
            break
    if not plan.fits:
        print("\n  none of them fits\n")
    return plan


def named(one: Candidate) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, one.sizes))
    return f"{mesh}, micro_batch {one.micro_batch}"


# ------------------------------------------------------------------------------------------------ text


def described(plan: Plan, utilisation: float) -> Iterator[str]:
    """The plan of a stage, line by line."""
    stage, topology = plan.stage, plan.topology
    # 1. What runs.
    shape, first = stage.shape, stage.programs[0]
    if stage.name == "annotate":
        who = f"{billions(first.parameters)} parameters of the {stage.model} read"
        what = f"{stage.pairs} pairs a batch"
    else:
        frozen = "" if first.trained == first.parameters else f" beside {billions(first.parameters)} frozen ones"
        who = f"the {stage.model}, {billions(first.trained)} parameters trained{frozen}"
        what = f"{stage.pairs} {units(stage)} an update, {stage.micro_batch} at a time"
    yield f"{stage.name}: {who}; {first.compute.dtype}, attention {first.compute.attention}"
    yield f"  {what}: {shape.rows} rows x {shape.length:,} tokens, {shape.scored:,} of them scored, at most"
    yield f"  at lengths from a fifth of the limits to all of them {in_words(plan.padding)}"
    # 2. Where it runs, what it takes there, and how fast it can be.
    mesh = ", ".join(f"{axis} {size}" for axis, size in stage.mesh.shape.items())
    hosts = f", on each of {topology.hosts} hosts" if stage.mesh.devices.size < topology.count else ""
    yield f"  mesh {mesh}{hosts} on {topology.name}: {topology.count} x {topology.chip.memory / GIB:.2f} GiB"
    yield ""
    yield from memory_table(plan)
    yield ""
    yield from time_lines(plan, utilisation)
    # 3. The verdict, and what could be changed.
    free = (topology.chip.memory - plan.largest) / GIB
    estimated = ", by estimate" if any(memory.source == "estimated" for memory in plan.memory.values()) else ""
    verdict = f"fits, {free:.1f} GiB left" if free >= 0 else f"DOES NOT FIT, {-free:.1f} GiB too much"
    yield ""
    yield f"  {stage.name} {verdict}{estimated}."
    if free < 0:
        yield (
            f"  Less memory: another mesh (--search), a smaller {stage.name}.micro_batch, {stage.model}.remat=full, "
            f"adapters ({stage.name}.lora.rank, lora.base=bfloat16), more chips."
            if stage.name != "annotate"
            else "  Less memory: annotate.teacher_weights=bfloat16, a smaller annotate.micro_batch, larger hosts, "
            "or all of them at once (annotate.devices=all)."
        )
    yield ""


def units(stage: Programs) -> str:
    """What an update is counted in."""
    return "responses" if stage.name.endswith("_sft") else "pairs"


def memory_table(plan: Plan) -> Iterator[str]:
    """GiB on one chip, a line for each program."""
    names = list(dict.fromkeys(name for memory in plan.memory.values() for name in memory.parts))
    yield "  " + f"{'GiB on a chip':20}" + "".join(f"{name:>13}" for name in (*names, "total"))
    for program, memory in plan.memory.items():
        values = [f"{memory.parts[name] / GIB:.2f}" if name in memory.parts else "" for name in names]
        yield "  " + f"{program:20}" + "".join(f"{value:>13}" for value in (*values, f"{memory.total / GIB:.2f}"))


def time_lines(plan: Plan, utilisation: float) -> Iterator[str]:
    """FLOPs, bytes, what bounds the time, and pairs a second."""
    update, chip = plan.update, plan.topology.chip
    pairs = plan.stage.pairs * plan.topology.count // plan.stage.mesh.devices.size
    # Each by itself: the slowest of them hides the others at best.
    times = {
        "arithmetic": update.flops / chip.flops,
        "memory": update.memory / chip.bandwidth,
        "links": update.links / chip.links,
        "network between slices": plan.network / NETWORK,
    }
    what = "batch" if plan.stage.name == "annotate" else "update"
    yield (
        f"  a chip's share of a{'n' if what == 'update' else ''} {what}: {update.flops / 1e12:.1f} TFLOP, "
        f"{update.memory / 1e9:.1f} GB of memory traffic, {update.links / 1e9:.1f} GB over links"
        + (f", {plan.network / 1e9:.1f} GB between slices" if plan.network else "")
    )
    limit = max(times, key=lambda name: times[name])
    bounds = ", ".join(f"{name} {seconds:.3f}" for name, seconds in times.items() if seconds)
    yield f"  seconds at the peak rates: {bounds}; {limit} is the limit"
    best, usual = pairs / plan.seconds(), pairs / plan.seconds(utilisation)
    share = f"{100 * utilisation:.0f} %"
    yield f"  {best:.1f} {units(plan.stage)}/s at 100 %, {usual:.1f} at {share} of the peak arithmetic"


def billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"
