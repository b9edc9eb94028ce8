"""Compiles the gradient of a small decoder for a TPU v5e, without one, and prints what the programs hold, as JSON.

Run by test_attention.py in a process of its own: libtpu stays out of the one that runs the tests.
"""

from __future__ import annotations

import json
import os
import re

os.environ["TPU_LOG_DIR"] = "disabled"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ctpd_jax.models.config import DecoderConfig, LayerKind
from ctpd_jax.models.decoder import hidden_states, param_shapes
from ctpd_jax.schema import RowLayout

LENGTH = 384  # no size of the model, so that an array of LENGTH x LENGTH can be nothing but scores or a mask


def program(backend: str, head_dim: int, softcap: float | None) -> str:
    config = DecoderConfig(
        family="llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        kinds=(LayerKind(window=None), LayerKind(window=100)),
        layer_kinds=(0, 1, 0, 1),
        attention_scale=head_dim**-0.5,
        attention_softcap=softcap,
    )
    v5e = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    there = SingleDeviceSharding(v5e.devices[0])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), param_shapes(config))
    ints = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32, sharding=there)

    def loss(params, tokens, row):
        hidden = hidden_states(config, params, tokens, row, "full", jnp.bfloat16, backend)
        return jnp.sum(hidden.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss)).trace(params, ints, RowLayout(ints, ints, ints))
    return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


def main() -> None:
    found = {}
    for backend in ("xla", "splash", "splash_segments"):
        for head_dim, softcap in ((64, None), (256, None if backend == "xla" else 20.0)):
            text = program(backend, head_dim, softcap)
            found[f"{backend} {head_dim}"] = {
                "kernels": sorted(set(re.findall(r"splash_mha_(?:fwd|dq|dkv)", text))),
                "calls": text.count('custom_call_target="tpu_custom_call"'),
                "square": sorted(set(re.findall(rf"\b\w+\[(?:\d+,)*{LENGTH},{LENGTH}\]", text))),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
