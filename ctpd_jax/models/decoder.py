"""One decoder for every family: plain functions of (config, params, arrays), with `layers.py` inside.

Parameters are a nested dict of arrays under Hugging Face's names, each weight [out, in]; those of the layers are
stacked along a first axis: `params["model"]["layers"]["self_attn"]["q_proj"]["weight"]` is [num_layers, out, in].

Letters: R rows, T tokens of a row, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ctpd_jax.models import adding, attention, attention_backends
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.layers import Layer, Norm, matmul
from ctpd_jax.schema import RowLayout
from ctpd_jax.sharding import ROWS, constrain

Params = dict[str, Any]
Remat = Literal["full", "dots", "none"]
# What the forward pass keeps of a layer for the backward pass, besides its input.
_KEPT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}


@lru_cache
def layer_graph(config: DecoderConfig) -> tuple[Any, Any]:
    """Return one layer's NNX graph definition, and its state as shapes."""
    return nnx.split(nnx.eval_shape(lambda: Layer(config)))


@lru_cache
def norm_graph(config: DecoderConfig) -> tuple[Any, Any]:
    """Return the final norm's NNX graph definition, and its state as shapes."""
    return nnx.split(nnx.eval_shape(lambda: Norm(config, config.hidden_size)))


# ------------------------------------------------------------------------------------------------ parameters


def param_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """Return the parameters as jax.ShapeDtypeStruct of `dtype`, in the layout that every function here takes.

    With config.int8 the layers' matrices are int8, their scales float32, and the others of `dtype`.
    """

    # The modules tell the shapes; of the layers' tensors there are num_layers, stacked on a first axis.
    def stacked(path: tuple[Any, ...], one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = one.dtype if one.dtype == jnp.int8 or path[-1].key == "scale" else dtype
        return jax.ShapeDtypeStruct((config.num_layers, *one.shape), own)

    layer, last = (nnx.to_pure_dict(state) for _, state in (layer_graph(config), norm_graph(config)))
    table = {"weight": jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), dtype)}
    params: Params = {
        "model": {
            "embed_tokens": table,
            "layers": jax.tree.map_with_path(stacked, layer),
            "norm": jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, dtype), last),
        }
    }
    return params if config.tied else params | {"lm_head": dict(table)}


def leaves(tree: Params) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every leaf of a nested dict with its path."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield tuple(entry.key for entry in path), leaf


def init_params(config: DecoderConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Draw fresh parameters: matrices normal with `initializer_range`, biases 0, norms the identity."""
    flat, tree = jax.tree.flatten_with_path(param_shapes(config, dtype))
    keys = jax.random.split(key, len(flat))

    # What a leaf is shows in its name; each has a key of its own.
    def fill(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if names[-1] == "bias":
            return jnp.zeros(shape.shape, dtype)
        if "norm" in names[-2]:
            return jnp.full(shape.shape, 1.0 - config.norm_offset, dtype)
        return (config.initializer_range * jax.random.normal(key, shape.shape, jnp.float32)).astype(dtype)

    return jax.tree.unflatten(tree, [fill(path, leaf, key) for (path, leaf), key in zip(flat, keys)])


def unembedding(config: DecoderConfig, params: Params) -> jax.Array:
    """Return the matrix [V, D] that takes hidden states to logits (the embedding itself where tied)."""
    return params["model"]["embed_tokens"]["weight"] if config.tied else params["lm_head"]["weight"]


# ------------------------------------------------------------------------------------------------ forward


def embed(
    config: DecoderConfig, params: Params, tokens: jax.Array, compute_dtype: Any, mesh: Mesh | None = None
) -> jax.Array:
    """Return the embeddings [R, T, D] of tokens [R, T]."""
    # On a mesh every device looks up its own columns for the rows of all of `fsdp`, and then they change places: the
    # table itself never moves.
    tokens = constrain(mesh, tokens, "data", None)
    x = constrain(mesh, params["model"]["embed_tokens"]["weight"][tokens], "data", None, "fsdp").astype(compute_dtype)
    x = constrain(mesh, x, ROWS, None, None)
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, compute_dtype)


def final_norm(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    """Apply the norm behind the last layer, and what all logits are multiplied by."""
    normed = nnx.merge(norm_graph(config)[0], params["model"]["norm"])(x)
    return normed if config.logit_scale == 1.0 else normed * jnp.asarray(config.logit_scale, normed.dtype)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines of every kind of layer, [kinds, R, T, turned/2]."""
    cos, sin = zip(*(attention.rope_table(kind.rope, config.turned, positions) for kind in config.kinds))
    return jnp.stack(cos), jnp.stack(sin)


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    row: RowLayout | None = None,
    remat: Remat = "dots",
    compute_dtype: Any = None,
    attention_backend: attention_backends.Backend = "plain",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Compute the last layer's output after the final norm.

    Args:
        tokens: int32 [R, T].
        row: positions and segments, int32 [R, T] each; None means one segment per row without padding.
        remat: what of a layer is kept for the backward pass. "full": its input alone; the least memory, a third more
            work. "dots": the matrix products too; what lies between them is computed again, which on a CPU is faster
            than keeping everything, since memory is the narrow place. "none": everything.
        compute_dtype: the dtype of the activations; parameters are cast where they are used. None: the parameters' own.
        attention_backend: see `attention_backends.make_attend`.
        mesh: of the devices that the parameters and the rows are spread over, or None for one device.

    Returns:
        [R, T, D] in the compute dtype. Values at padding mean nothing, but are finite.
    """
    if row is None:
        row = attention.causal_layout(*tokens.shape)
    compute_dtype = jnp.dtype(compute_dtype or params["model"]["norm"]["weight"].dtype)
    graph, _ = layer_graph(config)
    # 1. What differs between kinds of layers is computed once for each kind, and each layer picks its own.
    cos, sin = rope_tables(config, row.positions)
    attend = attention_backends.make_attend(attention_backend, config, row, mesh)
    on_tpu = attention_backend in ("splash", "splash_segments")
    rotate = attention.rotate_by_product if on_tpu else attention.rotate

    # The body of the scan: weights, kind and number of one layer, the residual stream in and out.
    def layer(carry: tuple[jax.Array, Any], scanned: tuple[Params, jax.Array, jax.Array]) -> tuple[tuple, None]:
        (x, through), (weights, kind, number) = carry, scanned
        weights, through = adding.tap(weights, through, number)
        module = nnx.merge(graph, weights)
        x = module(x, lambda heads: rotate(heads, cos[kind], sin[kind]), lambda q, k, v: attend(q, k, v, kind))
        return (constrain(mesh, x, ROWS, None, None), through), None

    # 2. Embed, scan over the stacked layers, norm. Of each layer the backward pass finds what `remat` keeps.
    x = embed(config, params, tokens, compute_dtype, mesh)
    kinds, numbers = np.asarray(config.layer_kinds, np.int32), np.arange(config.num_layers, dtype=np.int32)
    body: Any = jax.checkpoint(layer, policy=_KEPT[remat], prevent_cse=False)
    layers = params["model"]["layers"]
    weights, through = adding.begun(layers)
    (x, through), _ = jax.lax.scan(body, (x, through), (weights, kinds, numbers))
    return final_norm(config, params, adding.ended(layers, x, through))


def logits_of(config: DecoderConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Return logits, float32 [..., V], of hidden states [..., D], the final soft cap applied."""
    logits = matmul(hidden, unembedding(config, params).astype(hidden.dtype), jnp.float32)
    return logits if config.final_softcap is None else config.final_softcap * jnp.tanh(logits / config.final_softcap)


def apply(config: DecoderConfig, params: Params, tokens: jax.Array, row: RowLayout | None = None) -> jax.Array:
    """Return next-token logits, float32 [R, T, V], of tokens int32 [R, T]; see `hidden_states` for `row`.

    Large: training takes `hidden_states` and the log-probabilities of its targets, without the logits of all positions.
    """
    return logits_of(config, params, hidden_states(config, params, tokens, row))
