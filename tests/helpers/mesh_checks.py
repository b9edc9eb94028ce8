"""The same training on one device and on meshes of eight, printed as JSON for multi_device/test_mesh.py.

python -m helpers.mesh_checks WORKDIR
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from ctpd_jax.data.loader import plan_updates
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import PairItem, ScoredResponse
from ctpd_jax.job.lineage import params_digest
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.decoder import init_params, param_shapes
from ctpd_jax.models.lora import adapter_shapes, init_adapters, with_lora
from ctpd_jax.settings import preference
from ctpd_jax.sharding import make_mesh, row_devices, shard_shapes
from ctpd_jax.train.loop import train
from ctpd_jax.train.metrics import MetricLog, read_metrics
from ctpd_jax.train.sums import Objective, preference_sums
from helpers.recipes import recipe_of
from helpers.tiny import CONFIGS

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


def pairs(config, count=32, beyond=False):
    random = np.random.default_rng(5)

    def tokens(low, high):
        return random.integers(1, config.vocab_size, random.integers(low, high)).astype(np.int32)

    def response():
        ids = tokens(4, 20)
        plain = ids, random.uniform(0.5, 1.5, len(ids)).astype(np.float32), float(-4.0 * len(ids))
        if not beyond:
            return ScoredResponse(*plain)
        spans = np.arange(len(ids), dtype=np.int32) // 2  # of two tokens each
        return ScoredResponse(*plain, span_ids=spans, targets=random.normal(-8, 1, spans[-1] + 1).astype(np.float32))

    own = (0.7, 1.5) if beyond else ()
    return [PairItem(tokens(2, 12), response(), response(), *own) for _ in range(count)]


def run(name, sizes, layout, workdir, lora=False, beyond=False):
    """20 updates; the metrics of each, and the digest of the final parameters."""
    config = config_of(name)
    mesh = make_mesh(sizes, jax.devices() if sizes != MESHES["1"] else jax.devices()[:1])
    items = pairs(config, beyond=beyond)
    rows = PackingConfig(layout, True, 1, 8, 0, row_devices(mesh))
    settings = preference(3e-3, 0.1, batch_size=8, micro_batch=8)
    updates = plan_updates(items, 0, STEPS, 8, 8, rows)
    base = jax.jit(partial(init_params, config), out_shardings=jax.tree.map(
        lambda leaf: leaf.sharding, shard_shapes(mesh, param_shapes(config))))(jax.random.key(1))  # fmt: skip
    initial, shapes, frozen, trained = (lambda: base), param_shapes(config), {}, config
    if lora:
        trained = with_lora(config, 4, 8.0)
        initial, shapes, frozen = partial(init_adapters, trained, jax.random.key(2)), adapter_shapes(trained), base
    with MetricLog(workdir) as log:
        loss = partial(preference_sums, trained, Objective(0.1, regression=1.0), Compute(mesh=mesh))
        recipe = recipe_of(loss, shapes, settings, STEPS, param_shapes(config) if lora else {}, mesh, "train")
        params = train(recipe, workdir / "checkpoints", initial, frozen, updates, log)
    lines = read_metrics(workdir, "train")
    leaf = params["model"]["layers"]["mlp"]["up_proj"]["lora_a" if lora else "weight"]
    return {
        "loss": [line["loss"] for line in lines],
        "margin": [line["rewards/margins"] for line in lines],
        "programs": lines[-1]["compiled_programs"],
        "shapes": len(updates.shapes),
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
        found[f"beyond {mesh}"] = run("llama", MESHES[mesh], "shared", root / f"beyond-{mesh}", beyond=True)
        found[f"lora {mesh}"] = run("llama", MESHES[mesh], "response", root / f"lora-{mesh}", lora=True)
    found["again 2x2x2"] = run("llama", MESHES["2x2x2"], "response", root / "again")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
