"""The core functions give one set of numbers under jit, vmap, grad, shard_map, pmap and jit over a sharded mesh.

Run by multi_device/test_core.py in a process of its own, because eight simulated devices must be asked for before JAX
starts.

Letters: P pairs, 2 sides (chosen, rejected), T tokens, S spans, D width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ctpd_jax.core import losses, weights
from ctpd_jax.core.logprobs import token_logprobs
from ctpd_jax.core.projection import project_to_tokens, span_counts, span_means, span_sums

PAIRS, TOKENS, SPANS, WIDTH, VOCABULARY, CHUNK, BETA = 16, 10, 6, 8, 64, 32, 0.3

Batch = dict[str, jax.Array]
Result = dict[str, jax.Array]


def make_batch() -> tuple[jax.Array, Batch]:
    rng = np.random.RandomState(0)
    ids = np.sort(rng.randint(0, SPANS, size=(PAIRS, 2, TOKENS)), axis=-1).astype(np.int32)
    ids[:, :, -2:] = -1
    batch = {
        "hidden": rng.standard_normal((PAIRS, 2, TOKENS, WIDTH)).astype(np.float32),
        "targets": rng.randint(0, VOCABULARY, size=(PAIRS, 2, TOKENS)).astype(np.int32),
        "span_ids": ids,
        "positive": rng.uniform(-3, 0, (PAIRS, 2, SPANS)).astype(np.float32),
        "negative": rng.uniform(-3, 0, (PAIRS, 2, SPANS)).astype(np.float32),
        "reference": rng.uniform(-4, 0, (PAIRS, 2, SPANS)).astype(np.float32),
    }
    return jnp.asarray(rng.standard_normal((VOCABULARY, WIDTH)), jnp.float32), jax.tree.map(jnp.asarray, batch)


def all_of_core(unembedding: jax.Array, batch: Batch) -> Result:
    """Everything in core, per pair: [P, ...] in, [P, ...] out, no pair seeing another."""
    logps = token_logprobs(batch["hidden"], unembedding, batch["targets"], chunk=CHUNK, softcap=20.0)
    counts = span_counts(batch["span_ids"], SPANS)
    real = counts > 0
    mu = jnp.array([1.0, -1.0])[:, None]
    raw = weights.importance_weights(batch["positive"], batch["negative"], mu=mu, mask=real)
    transformed = [
        raw,
        weights.threshold_weights(raw, mask=real),
        weights.scale_weights(raw, mask=real),
        weights.rank_weights(raw, mask=real),
        weights.binary_weights(raw, 40, mask=real),
        weights.uniform_weights(real),
        weights.random_weights(jax.random.key(1), real),
    ]
    result: Result = {"logps": logps, "weights": jnp.stack(transformed, axis=-1)}
    policy = span_sums(logps, batch["span_ids"], SPANS)
    result["means"] = span_means(logps, batch["span_ids"], SPANS)
    for number, w in enumerate(transformed):
        sides = (x[..., side, :] for x in (policy, batch["reference"], w) for side in (0, 1))
        result[f"span form {number}"] = losses.ctpd_loss(*sides, BETA).loss
        a, c = losses.reward_coefficients(w, counts, batch["reference"], counts, counts, "mean", "byte")
        places = jnp.broadcast_to(jnp.arange(c.size).reshape(c.shape)[..., None], logps.shape)
        returns = losses.response_returns(logps, project_to_tokens(a, batch["span_ids"]), places, c)
        link = ("sigmoid", "ipo", "hinge")[number % 3]
        result[f"token form {number}"] = losses.preference_loss(returns[..., 0], returns[..., 1], BETA, loss=link).loss
    return result


def total(result: Result) -> jax.Array:
    return sum((x.sum() for name, x in result.items() if name not in ("logps", "weights")), jnp.float32(0))


def value_and_gradients(unembedding: jax.Array, batch: Batch) -> tuple[Result, jax.Array, jax.Array]:
    """Results of every pair, and the gradient of their sum by the unembedding and by the hidden states."""

    def objective(w: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Result]:
        result = all_of_core(w, batch | {"hidden": hidden})
        return total(result), result

    (_, result), gradients = jax.value_and_grad(objective, (0, 1), has_aux=True)(unembedding, batch["hidden"])
    return result, *gradients


# ------------------------------------------------------------------------------------------------ the ways to run it


def under_vmap(unembedding: jax.Array, batch: Batch) -> Any:
    """Pair by pair; the gradients of all pairs add up to that of the batch."""
    result, w, hidden = jax.jit(jax.vmap(value_and_gradients, in_axes=(None, 0)))(unembedding, batch)
    return result, w.sum(axis=0), hidden


def under_grad_of_vmap(unembedding: jax.Array, batch: Batch) -> Any:
    def objective(w: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Result]:
        result = jax.vmap(all_of_core, in_axes=(None, 0))(w, batch | {"hidden": hidden})
        return total(result), result

    gradients, result = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(unembedding, batch["hidden"])
    return result, *gradients


def data_mesh() -> Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def under_shard_map(unembedding: jax.Array, batch: Batch) -> Any:
    """Pairs over devices, the unembedding replicated: its gradient comes back summed over the devices by itself."""
    specs = {"in_specs": (P(), P("data")), "out_specs": (P("data"), P(), P("data"))}
    return jax.jit(jax.shard_map(value_and_gradients, mesh=data_mesh(), **specs))(unembedding, batch)


def under_unchecked_shard_map(unembedding: jax.Array, batch: Batch) -> Any:
    """The older kind without varying types, where the caller sums the gradient."""

    def summed(w: jax.Array, part: Batch) -> Any:
        result, w_gradient, hidden = value_and_gradients(w, part)
        return result, jax.lax.psum(w_gradient, "data"), hidden

    specs = {"in_specs": (P(), P("data")), "out_specs": (P("data"), P(), P("data"))}
    return jax.jit(jax.shard_map(summed, mesh=data_mesh(), check_vma=False, **specs))(unembedding, batch)


def under_grad_of_shard_map(unembedding: jax.Array, batch: Batch) -> Any:
    mapped = jax.shard_map(all_of_core, mesh=data_mesh(), in_specs=(P(), P("data")), out_specs=P("data"))

    def objective(w: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Result]:
        result = mapped(w, batch | {"hidden": hidden})
        return total(result), result

    gradients, result = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(unembedding, batch["hidden"])
    return result, *gradients


def under_pmap(unembedding: jax.Array, batch: Batch) -> Any:
    by_device = jax.tree.map(lambda x: x.reshape(8, PAIRS // 8, *x.shape[1:]), batch)
    result, w, hidden = jax.pmap(value_and_gradients, in_axes=(None, 0))(unembedding, by_device)
    joined = jax.tree.map(lambda x: x.reshape(PAIRS, *x.shape[2:]), (result, hidden))
    return joined[0], w.sum(axis=0), joined[1]


def under_pmap_with_psum(unembedding: jax.Array, batch: Batch) -> Any:
    def summed(w: jax.Array, part: Batch) -> Any:
        result, w_gradient, hidden = value_and_gradients(w, part)
        return result, jax.lax.psum(w_gradient, "devices"), hidden

    by_device = jax.tree.map(lambda x: x.reshape(8, PAIRS // 8, *x.shape[1:]), batch)
    result, w, hidden = jax.pmap(summed, axis_name="devices", in_axes=(None, 0))(unembedding, by_device)
    joined = jax.tree.map(lambda x: x.reshape(PAIRS, *x.shape[2:]), (result, hidden))
    return joined[0], w[0], joined[1]


def under_sharded_jit(unembedding: jax.Array, batch: Batch) -> Any:
    """Plain jit over a mesh: pairs over `data`, vocabulary over `tensor`."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    w = jax.device_put(unembedding, NamedSharding(mesh, P("tensor")))
    sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
    outputs = tuple(NamedSharding(mesh, s) for s in (P("data"), P("tensor"), P("data")))
    return jax.jit(value_and_gradients, out_shardings=outputs)(w, sharded)


WAYS: dict[str, Callable[[jax.Array, Batch], Any]] = {
    "jit": jax.jit(value_and_gradients),
    "vmap": under_vmap,
    "grad of vmap": under_grad_of_vmap,
    "shard_map": under_shard_map,
    "shard_map without varying types": under_unchecked_shard_map,
    "grad of shard_map": under_grad_of_shard_map,
    "pmap": under_pmap,
    "pmap with psum": under_pmap_with_psum,
    "jit over a mesh": under_sharded_jit,
}


def differences(found: Any, expected: Any) -> list[str]:
    """What differs by more than 1e-6 of its scale in a value, or 1e-5 in a gradient."""
    wrong = []
    for part, (name, tolerance) in enumerate((("value", 1e-6), ("d unembedding", 1e-5), ("d hidden", 1e-5))):
        for path, reference in jax.tree_util.tree_leaves_with_path(expected[part]):
            leaf = found[part][path[0].key] if path else found[part]
            error = float(np.max(np.abs(np.asarray(leaf) - np.asarray(reference))))
            scale = float(np.max(np.abs(np.asarray(reference))))
            if leaf.shape != reference.shape or not error <= tolerance * scale:
                wrong.append(f"{name}{jax.tree_util.keystr(path)}: {error:.1e} of {scale:.1e}")
    return wrong


def check_that_the_vocabulary_stays_sharded() -> list[str]:
    """Value and gradient over a mesh move neither the unembedding nor a block of logits between devices."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shapes = ((64, 512), P("data")), ((4096, 512), P("tensor")), ((64,), P("data"))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    gradient = jax.value_and_grad(lambda h, w, t: token_logprobs(h, w, t, chunk=8).sum(), (0, 1))
    outputs = (NamedSharding(mesh, P()), (NamedSharding(mesh, P("data")), NamedSharding(mesh, P("tensor"))))
    text = jax.jit(gradient, out_shardings=outputs).lower(*arguments).compile().as_text()
    block = (64 // 4) * (4096 // 2) // 8  # one device's share of a block of logits
    wrong = []
    for line in text.splitlines():
        if moved := re.search(r"= (.*?) (all-gather|all-to-all|collective-permute)\(", line):
            for dims in re.findall(r"\[([\d,]+)\]", moved.group(1)):
                if np.prod([int(n) for n in dims.split(",")]) >= block:
                    wrong.append(line.strip()[:160])
    return wrong


def main() -> None:
    assert jax.device_count() == 8, f"needs 8 devices, found {jax.device_count()}"
    unembedding, batch = make_batch()
    expected = value_and_gradients(unembedding, batch)  # operation by operation, on one device
    failures = {}
    for name, way in WAYS.items():
        failures[name] = differences(way(unembedding, batch), expected)
    failures["vocabulary stays sharded"] = check_that_the_vocabulary_stays_sharded()
    for name, wrong in failures.items():
        print(f"{'FAILED' if wrong else 'ok':8s}{name}", *wrong, sep="\n    ")
    if any(failures.values()):
        raise SystemExit(1)
    print("all ways agree")


if __name__ == "__main__":
    main()
