"""One decoder for every family: Flax NNX modules inside, plain functions of (config, params, arrays) outside.

Parameters are a nested dict of arrays under Hugging Face's names, each weight [out, in]; those of the layers are
stacked along a first axis: `params["model"]["layers"]["self_attn"]["q_proj"]["weight"]` is [num_layers, out, in].

Letters: R rows, T tokens of a row, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ctpd_jax.models import attention
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.schema import RowLayout

Params = dict[str, Any]
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


# ------------------------------------------------------------------------------------------------ modules


def _matmul(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """x [..., in] @ weight[out, in].T, accumulated and returned in `dtype` (x's by default).

    As one matrix of all tokens: with the row as an axis of its own XLA's CPU gradient is a tenth slower.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = jnp.einsum("ti,oi->to", flat, weight, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
    return out.reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """x @ weight.T + bias, in x's dtype."""

    def __init__(self, out: int, inp: int, bias: bool):
        self.weight = nnx.Param(jnp.zeros((out, inp)))
        self.bias = nnx.Param(jnp.zeros(out)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _matmul(x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight), computed in float32."""

    def __init__(self, size: int, config: DecoderConfig):
        self.weight = nnx.Param(jnp.full(size, 1.0 - config.norm_offset))
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig):
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(queries, config.hidden_size, config.qkv_bias)
        self.k_proj = Linear(keys, config.hidden_size, config.qkv_bias)
        self.v_proj = Linear(keys, config.hidden_size, config.qkv_bias)
        self.o_proj = Linear(config.hidden_size, queries, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None

    def heads(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [R, T, H, head_dim], keys and values [R, T, K, head_dim], turned to their positions."""
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, self.config.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return attention.rotate(q, cos, sin), attention.rotate(k, cos, sin), v

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, causal: bool) -> jax.Array:
        config = self.config
        out = attention.attend(q, k, v, seen, config.attention_scale, config.attention_softcap, causal)
        return self.o_proj(out.reshape(*out.shape[:2], -1))


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig):
        self.gate_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.up_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.down_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(_ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and MLP, each normed and added to the residual.

    Under Hugging Face's name `post_attention_layernorm` Llama has the MLP's norm, Gemma the attention's second one.
    """

    def __init__(self, config: DecoderConfig):
        norm = partial(RMSNorm, config.hidden_size, config)
        self.post_norms = config.post_norms
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def attention_input(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.self_attn.heads(self.input_layernorm(x), cos, sin)

    def rest(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, causal: bool) -> jax.Array:
        """The layer after its queries, keys and values are known."""
        mixed = self.self_attn.mix(q, k, v, seen, causal)
        if self.post_norms:
            x = x + self.post_attention_layernorm(mixed)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x))

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, seen: jax.Array) -> jax.Array:
        return self.rest(x, *self.attention_input(x, cos, sin), seen, causal=True)


@lru_cache
def layer_graph(config: DecoderConfig) -> tuple[Any, Params]:
    """One layer's NNX graph definition, and the shapes of its parameters as a nested dict."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Layer(config)))
    return graph, nnx.to_pure_dict(state)


@lru_cache
def _norm_graph(config: DecoderConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: RMSNorm(config.hidden_size, config)))[0]


# ------------------------------------------------------------------------------------------------ parameters


def param_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """The parameters as jax.ShapeDtypeStruct, in the layout that every function here takes."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    layers = jax.tree.map(lambda one: array(config.num_layers, *one.shape), layer_graph(config)[1])
    params: Params = {
        "model": {
            "embed_tokens": {"weight": array(config.vocab_size, config.hidden_size)},
            "layers": layers,
            "norm": {"weight": array(config.hidden_size)},
        }
    }
    if not config.tied:
        params["lm_head"] = {"weight": array(config.vocab_size, config.hidden_size)}
    return params


def init_params(config: DecoderConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters: matrices normal with `initializer_range`, biases 0, norms the identity."""
    flat, tree = jax.tree.flatten_with_path(param_shapes(config, dtype))
    keys = jax.random.split(key, len(flat))

    def fill(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if names[-1] == "bias":
            return jnp.zeros(shape.shape, dtype)
        if "norm" in names[-2]:
            return jnp.full(shape.shape, 1.0 - config.norm_offset, dtype)
        return (config.initializer_range * jax.random.normal(key, shape.shape, jnp.float32)).astype(dtype)

    return jax.tree.unflatten(tree, [fill(path, leaf, key) for (path, leaf), key in zip(flat, keys)])


def unembedding(config: DecoderConfig, params: Params) -> jax.Array:
    """[V, D]: the matrix whose product with the hidden states is the logits (the embedding itself where tied)."""
    return params["model"]["embed_tokens"]["weight"] if config.tied else params["lm_head"]["weight"]


# ------------------------------------------------------------------------------------------------ forward


def embed(config: DecoderConfig, params: Params, tokens: jax.Array, compute_dtype: Any) -> jax.Array:
    x = params["model"]["embed_tokens"]["weight"][tokens].astype(compute_dtype)
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, compute_dtype)


def final_norm(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    return nnx.merge(_norm_graph(config), params["model"]["norm"])(x)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every kind of layer, [kinds, R, T, head_dim/2]."""
    tables = [attention.rope_table(kind.rope, config.head_dim, positions) for kind in config.kinds]
    cos, sin = zip(*tables)
    return jnp.stack(cos), jnp.stack(sin)


def masks(config: DecoderConfig, row: RowLayout, keys: RowLayout | None = None) -> jax.Array:
    """Who sees whom in every kind of layer, bool [kinds, R, T, S]; see `attention.visible`."""
    return jnp.stack([attention.visible(row, kind.window, keys) for kind in config.kinds])


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    row: RowLayout | None = None,
    remat: bool = False,
    compute_dtype: Any = None,
) -> jax.Array:
    """The last layer's output after the final norm.

    Args:
        tokens: int32 [R, T].
        row: positions and segments, int32 [R, T] each; None means one segment per row without padding.
        remat: for the backward pass keep only each layer's input and compute all of the layer again: the least memory,
            a third more work. False keeps the matrix products as well.
        compute_dtype: the dtype of the activations; parameters are cast where they are used. None: the parameters' own.

    Returns:
        [R, T, D] in the compute dtype. Values at padding mean nothing, but are finite.
    """
    if row is None:
        row = attention.causal_layout(*tokens.shape)
    compute_dtype = jnp.dtype(compute_dtype or params["model"]["norm"]["weight"].dtype)
    graph, _ = layer_graph(config)
    # What differs between kinds of layers is computed once for each kind, and each layer picks its own.
    cos, sin = rope_tables(config, row.positions)
    seen = masks(config, row)

    def layer(x: jax.Array, scanned: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        weights, kind = scanned
        return nnx.merge(graph, weights)(x, cos[kind], sin[kind], seen[kind]), None

    x = embed(config, params, tokens, compute_dtype)
    kinds = np.asarray(config.layer_kinds, np.int32)
    # Without remat the matrix products are kept and what lies between is computed again: on a CPU that is faster than
    # keeping everything, since memory is the narrow place, and takes less than half of the room.
    policy = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    body: Any = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(body, x, (params["model"]["layers"], kinds))
    return final_norm(config, params, x)


def logits_of(config: DecoderConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """float32 [..., V] of hidden states [..., D], the final soft cap applied."""
    logits = _matmul(hidden, unembedding(config, params).astype(hidden.dtype), jnp.float32)
    return logits if config.final_softcap is None else config.final_softcap * jnp.tanh(logits / config.final_softcap)


def apply(config: DecoderConfig, params: Params, tokens: jax.Array, row: RowLayout | None = None) -> jax.Array:
    """Next-token logits, float32 [R, T, V], of tokens int32 [R, T]; see `hidden_states` for `row`.

    Large: training takes `hidden_states` and the log-probabilities of its targets, without the logits of all positions.
    """
    return logits_of(config, params, hidden_states(config, params, tokens, row))
