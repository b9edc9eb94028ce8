"""What the text of a compiled program holds: attention kernels, and arrays with a vocabulary axis."""

from __future__ import annotations

import itertools
import math
import re

from jax.sharding import Mesh

from ctpd_jax.core.logprobs import BLOCK_BYTES
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.plan.programs import Program, Programs
from ctpd_jax.sharding import AXES


def kernels(text: str) -> int:
    """How many splash attention kernels a compiled program holds."""
    calls = text.split('custom_call_target="tpu_custom_call"')[1:]
    return sum("splash" in call[:4000] for call in calls)  # in the call's own metadata


def vocabulary_arrays(text: str, decoder: DecoderConfig, mesh: Mesh) -> dict[str, list[tuple[int, ...]]]:
    """The shapes in a compiled program that have the vocabulary, or some devices' part of it, for an axis.

    "unembedding": two axes, the other one the width D or its part on a device; its gradient and moments look the same.
    "block": of logits, no larger than what `core.logprobs` holds at once. "other": what should not be there.
    """
    sizes = [mesh.shape[axis] for axis in AXES]
    parts = {math.prod(chosen) for count in range(4) for chosen in itertools.combinations(sizes, count)}
    vocabulary = {decoder.vocab_size // part for part in parts}
    widths = {decoder.hidden_size, decoder.hidden_size // mesh.shape["fsdp"]}
    found: dict[str, set[tuple[int, ...]]] = {"unembedding": set(), "block": set(), "other": set()}
    for dims in set(re.findall(r"\b(?:f32|bf16|f16|s32|u32|s8|pred)\[([\d,]+)\]", text)):
        shape = tuple(int(size) for size in dims.split(",") if size != "1")
        if len(shape) < 2 or not vocabulary & set(shape):
            continue
        if len(shape) == 2 and widths & set(shape):
            found["unembedding"].add(shape)
        else:
            found["block" if math.prod(shape) * 4 <= BLOCK_BYTES else "other"].add(shape)
    return {kind: sorted(shapes, key=math.prod) for kind, shapes in found.items()}


def contents(text: str, program: Program, stage: Programs) -> str:
    """What a compiled program holds of attention kernels and of arrays with a vocabulary axis."""
    arrays = vocabulary_arrays(text, program.decoder, stage.mesh)
    largest = {kind: " x ".join(f"{size:,}" for size in shapes[-1]) for kind, shapes in arrays.items() if shapes}
    told = [
        f"{name} up to {largest[kind]}"
        for kind, name in (("unembedding", "shapes of the unembedding"), ("block", "blocks of logits"))
        if kind in largest
    ]
    told.append(f"OTHERS up to {largest['other']}" if "other" in largest else "nothing else")
    return f"{kernels(text)} splash kernels; with a vocabulary axis {', '.join(told)}"
