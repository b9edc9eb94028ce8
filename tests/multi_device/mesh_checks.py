"""The same training on one device and on meshes of eight. Prints what it found as JSON; run by test_mesh.py.

python mesh_checks.py WORKDIR
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tiny import CONFIGS

from ctpd_jax.data.loader import batch_indices, plan_shapes, update_batches
from ctpd_jax.data.packing import PackingConfig as Rows
from ctpd_jax.data.rows import PairItem, ScoredResponse
from ctpd_jax.models.decoder import init_params, param_shapes
from ctpd_jax.models.lora import adapter_shapes, init_adapters, with_lora
from ctpd_jax.run import params_digest
from ctpd_jax.settings import preference
from ctpd_jax.sharding import make_mesh, row_devices, shard_shapes
from ctpd_jax.train.loop import train
from ctpd_jax.train.metrics import MetricLog, read_metrics
from ctpd_jax.train.step import Compute, Objective, preference_sums

MESHES = {
    "1": {"data": 1, "fsdp": 1, "tensor": 1},
    "8 data": {"data": 8, "fsdp": 1, "tensor": 1},
    "8 fsdp": {"data": 1, "fsdp": 8, "tensor": 1},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
STEPS = 20


def config_of(name):
    """A tiny decoder whose vocabulary, widths and heads eight devices can share."""
    return replace(CONFIGS[name], vocab_size=96, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2,
                   initializer_range=0.1)  # fmt: skip


def pairs(config, count=32):
    random = np.random.default_rng(5)

    def tokens(low, high):
        return random.integers(1, config.vocab_size, random.integers(low, high)).astype(np.int32)

    def response():
        ids = tokens(4, 20)
        return ScoredResponse(ids, random.uniform(0.5, 1.5, len(ids)).astype(np.float32), float(-4.0 * len(ids)))

    return [PairItem(tokens(2, 12), response(), response()) for _ in range(count)]


def run(name, sizes, layout, workdir, lora=False):
    """20 updates; the metrics of each, and the digest of the final parameters."""
    config = config_of(name)
    mesh = make_mesh(sizes, jax.devices() if sizes != MESHES["1"] else jax.devices()[:1])
    items = pairs(config)
    rows = Rows(layout, True, 1, 8, 0, row_devices(mesh))
    settings = preference(3e-3, 0.1, batch_size=8, micro_batch=8)
    updates = [batch_indices(0, step, len(items), 8) for step in range(STEPS)]
    shapes = plan_shapes(items, updates, 8, rows)
    batches = update_batches(items, 0, 8, 8, rows, shapes)
    base = jax.jit(partial(init_params, config), out_shardings=jax.tree.map(
        lambda leaf: leaf.sharding, shard_shapes(mesh, param_shapes(config))))(jax.random.key(1))  # fmt: skip
    initial, abstract, frozen, trained = (lambda: base), param_shapes(config), None, config
    if lora:
        trained = with_lora(config, 4, 8.0)
        initial, abstract, frozen = partial(init_adapters, trained, jax.random.key(2)), adapter_shapes(trained), base
    with MetricLog(workdir) as log:
        params = train(
            "train", workdir / "checkpoints", settings, STEPS, initial, abstract,
            partial(preference_sums, trained, Objective(0.1), Compute(mesh=mesh)),
            batches, len(shapes), log, frozen=frozen, mesh=mesh,
        )  # fmt: skip
    lines = read_metrics(workdir, "train")
    leaf = params["model"]["layers"]["mlp"]["up_proj"]["lora_a" if lora else "weight"]
    return {
        "loss": [line["loss"] for line in lines],
        "margin": [line["rewards/margins"] for line in lines],
        "programs": lines[-1]["compiled_programs"],
        "shapes": len(shapes),
        "digest": params_digest(params),
        "share": leaf.addressable_shards[0].data.size / leaf.size,
    }


def main() -> None:
    root = Path(sys.argv[1])
    found = {}
    for name, layout in (("llama", "response"), ("gemma3", "shared")):
        for mesh, sizes in MESHES.items():
            found[f"{name} {mesh}"] = run(name, sizes, layout, root / f"{name}-{mesh}".replace(" ", "_"))
    for mesh in ("1", "2x2x2"):
        found[f"lora {mesh}"] = run("llama", MESHES[mesh], "response", root / f"lora-{mesh}", lora=True)
    found["again 2x2x2"] = run("llama", MESHES["2x2x2"], "response", root / "again")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
