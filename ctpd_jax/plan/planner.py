"""Does a stage fit a slice of TPUs, and how fast can it be at best? Compiled ahead of time, without a TPU.

Letters: D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.core.logprobs import BLOCK_BYTES
from ctpd_jax.data.rows import BatchShape
from ctpd_jax.errors import UserError
from ctpd_jax.job.job import OWN_MESH
from ctpd_jax.plan.chips import NETWORK, Topology, devices_of
from ctpd_jax.plan.costs import Work, work
from ctpd_jax.plan.programs import Bases, Program, Programs, plan_stage, share, usual_padding
from ctpd_jax.sharding import AXES, make_mesh, row_devices

# Of the chip's main memory; kernels can run out of others.
_OUT_OF_MEMORY = re.compile(r"(?:space hbm\. Used |on HBM, the total memory required for [\w ]*\()([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes that a program needs on one device, by what they are; `parts` sum to `total` unless it was "refused"."""

    parts: Mapping[str, float]
    total: float
    source: Literal["compiled", "refused", "estimated"]  # refused: the compiler gave up, and said how much it wanted


@dataclass(frozen=True)
class Plan:
    """A stage on a topology."""

    stage: Programs
    topology: Topology
    memory: Mapping[str, Memory]  # by program
    work: Mapping[str, Work]  # of one call of each program, on one device
    texts: Mapping[str, str]  # the compiled programs, as text
    padding: float  # share of the tokens laid out, at usual lengths

    @property
    def largest(self) -> float:
        return max(memory.total for memory in self.memory.values())

    @property
    def fits(self) -> bool:
        return self.largest <= self.topology.chip.memory

    @property
    def update(self) -> Work:
        """Of all calls of an update, or of a batch of an annotation."""
        return sum((self.work[program.name].times(program.times) for program in self.stage.programs), Work())

    def seconds(self, utilisation: float = 1.0) -> float:
        """What an update takes at least, with so much of the peak arithmetic in the products."""
        return bound(self.update, self.topology, utilisation, self.network)

    @property
    def network(self) -> float:
        """Bytes that a chip sends and receives between slices in an update: the gradient of each micro-batch."""
        others, own = (self.topology.slices - 1) / self.topology.slices, self.stage.programs[0]
        return 2 * own.memory.get("gradient", 0.0) * own.times * others


def bound(update: Work, topology: Topology, utilisation: float = 1.0, network: float = 0.0) -> float:
    """Seconds: the slowest of arithmetic, memory, links and network, each of which may hide behind the others."""
    chip = topology.chip
    return max(
        network / NETWORK,
        update.flops / (chip.flops * utilisation),
        update.memory / chip.bandwidth,
        update.links / chip.links,
    )


def make_plan(
    config: ConfigDict, name: str, bases: Bases, topology: Topology, devices: list[Any], compiled: bool
) -> Plan:
    """Compiles the programs of a stage, or estimates what they need.

    Raises:
        UserError: the run itself would refuse, or the mesh does not fit the topology.
    """
    stage = plan_stage(config, name, bases, mesh_of(config, name, topology, devices))
    # Memory by the compiler's account where it is there, time always by count.
    memory, texts = {}, {}
    for program in stage.programs:
        if compiled:
            memory[program.name], texts[program.name] = compile_program(program)
        else:
            memory[program.name] = estimate(stage, program)
    padding = usual_padding(config, name, stage.mesh)
    return Plan(stage, topology, memory, work_of(config, name, bases, stage), texts, padding)


def mesh_of(config: ConfigDict, name: str, topology: Topology, devices: list[Any]) -> Mesh:
    """The mesh that a stage has on a topology. Annotation is divided among hosts, or not: see `score.reading_mesh`."""
    # A host is a topology of its own: libtpu does not compile for a part of one.
    if name == "annotate" and topology.hosts > 1 and config.annotate.devices == "host":
        return make_mesh(OWN_MESH, devices_of(topology.host))
    return make_mesh(config.mesh, devices)


# ------------------------------------------------------------------------------------------------ memory


def compile_program(program: Program) -> tuple[Memory, str]:
    """What the compiler for TPUs makes of a program: its memory and its text, which is empty where it gave up.

    Raises:
        UserError: it gave up for another reason than the chip's memory.
    """
    try:
        compiled = program.traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if not found:
            raise UserError(
                f"The compiler for TPUs cannot compile {program.name}: {str(error).splitlines()[0]} "
                "Try another --config.attention, or --estimate, which does not compile."
            ) from error
        # The arguments are among what it counts, although it speaks of temporaries.
        return Memory(program.memory, float(found[1]) * _UNITS[found[2]] + program.beside, "refused"), ""
    # What lies on the device while it runs: what was known before, and what the compiler adds.
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = dict(program.memory) | {
        "activations": float(stats.temp_size_in_bytes),
        "output": float(results + stats.generated_code_size_in_bytes),
    }
    # The arguments as the compiler lays them out, padding to tiles included.
    total = stats.argument_size_in_bytes + program.beside + parts["activations"] + parts["output"]
    parts["batch"] += total - sum(parts.values())
    return Memory(parts, total, "compiled"), compiled.as_text()


def estimate(stage: Programs, program: Program) -> Memory:
    """The same from arithmetic: see `activations`."""
    parts = dict(program.memory) | {"activations": activations(stage, program), "output": 0.0}
    return Memory(parts, sum(parts.values()), "estimated")


def activations(stage: Programs, program: Program) -> float:
    """Bytes of what lives within a program only, about: totals came out within a tenth of the compiler's.

    What each layer keeps for the backward pass; the work on one layer, whose widest arrays live about four at a time;
    two layers' matrices, where they are gathered; all matrices in the compute dtype, where they are stored in a wider
    one; two blocks of logits; this micro-batch's gradient of what lies outside the layers, or of adapters, before it is
    added, and of the unembedding as it is multiplied.
    """
    if program.name == "update":
        return 0.0
    # One device's share of tokens, heads and MLP width.
    config, mesh, training = program.decoder, stage.mesh, program.training
    size = 2 if program.compute.dtype == "bfloat16" else 4
    tensor, fsdp, rows = mesh.shape["tensor"], mesh.shape["fsdp"], row_devices(mesh)
    tokens = stage.shape.rows * stage.shape.length / rows
    scored = stage.shape.rows * stage.shape.scored / rows
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim / tensor
    inner = config.intermediate_size / tensor
    layer = config.hidden_size * (2 * heads + 3 * inner * max(1, config.experts))  # matrices of one layer, about
    # The parts, in the order of the docstring.
    kept = {"full": 0.0, "dots": heads + config.hidden_size + 3 * inner, "none": 3 * heads + 5 * inner}
    per_layer = tokens * size * (config.hidden_size + kept[program.compute.remat]) if training else 0.0
    working = 4 * tokens * size * (config.hidden_size + heads + inner)
    gathered = 2 * layer * size if fsdp > 1 else 0.0
    share = program.parameters / (fsdp * tensor)
    narrowed = share * size if program.memory["parameters"] > 3 * share and size == 2 else 0.0
    logits = 2 * BLOCK_BYTES + scored * config.hidden_size * 6
    gradient = program.memory["gradient"] if training else 0.0
    if program.trained == program.parameters:
        tables = config.vocab_size * config.hidden_size / (fsdp * tensor)
        gradient = tables * (4 * (1 if config.tied else 2) + size)
    return config.num_layers * per_layer + working + gathered + narrowed + logits + gradient


# ------------------------------------------------------------------------------------------------ time


def work_of(config: ConfigDict, name: str, bases: Bases, stage: Programs) -> dict[str, Work]:
    """Arithmetic and bytes of each program on one device, counted on that device's share of it."""
    # The same stage on one device, with that device's share of the model and of the rows: what it computes is counted.
    tensor, rows = stage.mesh.shape["tensor"], row_devices(stage.mesh)
    alone = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, [stage.mesh.devices.flat[0]])
    shape = BatchShape(stage.shape.rows // rows, stage.shape.length, stage.shape.scored)
    own = plan_stage(config, name, {model: share(base, tensor) for model, base in bases.items()}, alone, shape)
    found = {program.name: work(program.traced.jaxpr) for program in own.programs}
    # What no product shows: gradients and moments that are read and written, and what comes over the links.
    for program in stage.programs:
        gradient = program.memory.get("gradient", 0.0)
        if program.name == "update":  # elementwise: everything is read and written, the gradient is read twice
            trained = gradient + program.memory["optimizer"]
            found["update"] = Work(0.0, 2 * trained + 2 * gradient)
        else:
            found[program.name] += Work(0.0, 3 * gradient, over_links(stage, program))
    return found


def over_links(stage: Programs, program: Program) -> float:
    """Bytes that a device receives in one call, by the rules of `sharding.py`; in the compute dtype.

    `fsdp`: the layers' matrices and the unembedding are gathered in every pass, and all gradients, where there are any,
    are summed and scattered. `data`: each gradient's shard is summed. `tensor`: the activations are summed twice
    in every layer and pass.
    """
    mesh, config = stage.mesh, program.decoder
    size = 2 if program.compute.dtype == "bfloat16" else 4
    data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    # Forward and backward, and the forward pass again where its activations are computed anew.
    passes = (3 if program.compute.remat == "full" else 2) if program.training else 1
    looked_up = 0 if config.tied else config.vocab_size * config.hidden_size  # the embedding stays where it is
    whole = (program.parameters - looked_up) * size / tensor  # as one device sees it gathered
    trained = program.trained * size / tensor
    tokens = stage.shape.rows * stage.shape.length / (data * fsdp)
    gathered = passes * whole * (fsdp - 1) / fsdp
    scattered = trained * (fsdp - 1) / fsdp + 2 * trained / fsdp * (data - 1) / data
    summed = 2 * passes * config.num_layers * tokens * config.hidden_size * size * 2 * (tensor - 1) / tensor
    return gathered + scattered + summed


# ------------------------------------------------------------------------------------------------ search


@dataclass(frozen=True)
class Candidate:
    """A mesh and a micro-batch, what they are estimated to need, and the settings that make a run use them."""

    sizes: tuple[int, int, int]  # of AXES
    micro_batch: int
    memory: float  # bytes on one device
    seconds: float  # of an update, or of a shard of an annotation, at best
    links: float  # bytes, of the same
    settings: Mapping[str, int]


def candidates(config: ConfigDict, name: str, bases: Bases, topology: Topology, devices: list[Any]) -> list[Candidate]:
    """Of each mesh the largest micro-batch that fits by the estimate, or else the smallest; the best first.

    Raises:
        UserError: no mesh divides the model, or the run would refuse on every one: the first reason.
    """
    # What can be chosen: the mesh of all chips, or none where each host reads for itself; micro-batches that divide.
    annotating = name == "annotate"
    pairs = config.annotate.pairs_per_shard if annotating else config[name].batch_size
    given = annotating and topology.hosts > 1 and config.annotate.devices == "host"  # the mesh is that of each host
    found, refused = [], None
    for sizes in [(1, topology.host.count, 1)] if given else meshes(topology.count):
        best, rows = None, math.inf
        for micro_batch in micro_batches(pairs):
            settings = {f"{name}.micro_batch": micro_batch}
            if not given:
                settings |= {f"mesh.{axis}": size for axis, size in zip(AXES, sizes)}
            changed = with_settings(config, settings)
            try:
                stage = plan_stage(changed, name, bases, mesh_of(changed, name, topology, devices))
            except UserError as error:  # mostly what does not divide
                refused = refused or error
                break
            if stage.shape.rows >= rows:  # fewer pairs in as many rows: padding
                break
            rows = stage.shape.rows
            # Of one mesh the first micro-batch that fits is the largest: the search goes on with the next mesh.
            memory = max(estimate(stage, program).total for program in stage.programs)
            each, calls = work_of(changed, name, bases, stage), pairs / micro_batch if annotating else 1
            update = sum((each[one.name].times(one.times * calls) for one in stage.programs), Work())
            best = Candidate(sizes, micro_batch, memory, bound(update, topology), update.links, settings)
            if memory <= topology.chip.memory:
                break
        if best:
            found.append(best)
    if refused and not found:
        raise refused
    return sorted(found, key=lambda one: (one.memory > topology.chip.memory, one.seconds, one.links))


def meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    """All sizes of AXES whose product is `devices`."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for fsdp, tensor in itertools.product(sizes, sizes):
        if devices % (fsdp * tensor) == 0:
            yield devices // (fsdp * tensor), fsdp, tensor


def micro_batches(pairs: int) -> list[int]:
    """The sizes that divide an update, the largest first; of an annotation's batch, at most 64."""
    return [size for size in range(min(pairs, 64), 0, -1) if pairs % size == 0]


def with_settings(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(settings)
    return changed


def smaller(one: Candidate, name: str, pairs: int) -> Candidate | None:
    """The same mesh with the next smaller micro-batch, for where the estimate was too low."""
    sizes = [size for size in micro_batches(pairs) if size < one.micro_batch]
    if not sizes:
        return None
    settings = dict(one.settings) | {f"{name}.micro_batch": sizes[0]}
    return replace(one, micro_batch=sizes[0], settings=settings)
