"""One layer of the decoder as Flax NNX modules, built from the features of a DecoderConfig.

Attributes carry Hugging Face's names, so that the state of a layer is its tensors. Letters: R rows, T tokens of a row,
N = R * T, H query heads, K key-value heads, E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ctpd_jax.models.config import DecoderConfig

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # queries, keys, values -> what was attended to
Turn = Callable[[jax.Array], jax.Array]  # queries or keys [R, T, heads, head_dim] -> turned to their positions
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
_FEW_TOKENS = 32  # up to so many XLA's CPU products read the weights up to twice as fast if these stand on the left


def matmul(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """Multiply x [..., in] by weight[out, in].T, accumulated and returned in `dtype` (x's by default)."""
    # As one matrix of all tokens: with the row as an axis of its own XLA's CPU gradient is a tenth slower.
    flat = x.reshape(-1, x.shape[-1])
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
    if len(flat) <= _FEW_TOKENS and jax.default_backend() == "cpu":
        # The barrier keeps XLA from turning the product and its transpose back into the other order.
        out = jax.lax.optimization_barrier(product("oi,ti->ot", weight, flat)).T
    else:
        out = product("ti,oi->to", flat, weight)
    return out.reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """x W^T + bias, in x's dtype, and beside it (alpha / rank) (x A^T) B^T where the config has adapters on `name`.

    With config.int8 W is q * scale. Every int8 is a bfloat16 too: the product is that of q, and the scale comes after.
    """

    def __init__(self, config: DecoderConfig, name: str, out: int, inp: int, bias: bool):
        whole = not config.int8 or not name  # a router without a name decides more finely than that
        self.weight = nnx.Param(jnp.zeros((out, inp), jnp.float32 if whole else jnp.int8))
        self.scale = None if whole else nnx.Param(jnp.zeros(out))
        self.bias = nnx.Param(jnp.zeros(out)) if bias else None
        self.lora = config.lora if config.lora is not None and name in config.lora.targets else None
        if self.lora is not None:
            self.lora_a = nnx.Param(jnp.zeros((self.lora.rank, inp)))
            self.lora_b = nnx.Param(jnp.zeros((out, self.lora.rank)))

    def __call__(self, x: jax.Array) -> jax.Array:
        # The adapters' product goes through the narrow side: no matrix of W's size is made of them.
        y = matmul(x, self.weight[...].astype(x.dtype))
        if self.scale is not None:
            y = y * self.scale[...].astype(x.dtype)
        if self.lora is not None:
            low = matmul(x, self.lora_a[...].astype(x.dtype)) * jnp.asarray(self.lora.scale, x.dtype)
            y = y + matmul(low, self.lora_b[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """x / rms(x) * (offset + weight), or as a "layer" norm (x - mean(x)) / std(x) * weight + bias; in float32."""

    def __init__(self, config: DecoderConfig, size: int):
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.weight = nnx.Param(jnp.full(size, 1.0 - config.norm_offset))
        self.bias = nnx.Param(jnp.zeros(size)) if config.norm == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if self.bias is not None:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        out = wide * scale * (self.offset + self.weight[...].astype(jnp.float32))
        return (out if self.bias is None else out + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """The projections of attention; who sees whom, and the sum over values, is `attention.py`'s."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        project = partial(Linear, config, inp=config.hidden_size, bias=config.qkv_bias)
        if config.fused_qkv:
            self.qkv_proj = project("qkv_proj", queries + 2 * keys)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                project("q_proj", queries),
                project("k_proj", keys),
                project("v_proj", keys),
            )
        self.o_proj = Linear(config, "o_proj", config.hidden_size, queries, config.out_bias)
        if config.qk_norm:
            over_all = config.qk_norm == "all"
            self.q_norm = Norm(config, queries if over_all else config.head_dim)
            self.k_norm = Norm(config, keys if over_all else config.head_dim)

    def heads(self, x: jax.Array, turn: Turn) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project x to queries [R, T, H, head_dim] and keys, values [R, T, K, head_dim], turned to their positions."""
        q, k, v = self._project(x)
        # The norm of queries and keys comes before the heads are split, or after.
        if self.config.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.config.head_dim) for part in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return turn(q), turn(k), v

    def _project(self, x: jax.Array) -> list[jax.Array]:
        config = self.config
        if not config.fused_qkv:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        fused = self.qkv_proj(x)
        if config.fused_qkv == "heads":
            # Every head's own query, key and value lie side by side.
            parts = jnp.split(fused.reshape(*x.shape[:2], config.num_heads, -1), 3, axis=-1)
            return [part.reshape(*x.shape[:2], -1) for part in parts]
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return jnp.split(fused, [queries, queries + keys], axis=-1)


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig):
        self.config = config
        wide = partial(Linear, config, inp=config.hidden_size, bias=config.mlp_bias)
        if config.fused_mlp:
            self.gate_up_proj = wide("gate_up_proj", 2 * config.intermediate_size)
        else:
            self.up_proj = wide("up_proj", config.intermediate_size)
            if config.gated:
                self.gate_proj = wide("gate_proj", config.intermediate_size)
        self.down_proj = Linear(config, "down_proj", config.hidden_size, config.intermediate_size, config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        activation = _ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            return self.down_proj(activation(self.up_proj(x)))
        if self.config.fused_mlp:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(activation(gate) * up)


class Expert(nnx.Module):
    """One matrix of every expert: [E, out, in]."""

    def __init__(self, config: DecoderConfig, out: int, inp: int):
        self.weight = nnx.Param(jnp.zeros((config.experts, out, inp)))

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """x [N, in], sorted by its expert, of which expert e has sizes[e] rows -> [N, out]."""
        # Expert e multiplies its own rows: the rows are the ragged axis, the experts the groups.
        groups = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
        )
        return jax.lax.ragged_dot_general(
            x, self.weight[...].astype(x.dtype), sizes, groups, precision=jax.lax.Precision.HIGHEST
        )


class Experts(nnx.Module):
    """The matrices of all experts, under the names that checkpoints have them."""

    def __init__(self, config: DecoderConfig):
        self.gate_proj = Expert(config, config.intermediate_size, config.hidden_size)
        self.up_proj = Expert(config, config.intermediate_size, config.hidden_size)
        self.down_proj = Expert(config, config.hidden_size, config.intermediate_size)


class Mixture(nnx.Module):
    """Every token goes through the few MLPs that its router finds likeliest, weighted by their probabilities."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        self.gate = Linear(config, "", config.experts, config.hidden_size, bias=False)
        self.experts = Experts(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        config, mlp, flat = self.config, self.experts, x.reshape(-1, x.shape[-1])
        # 1. Every token's experts and their shares.
        probabilities = jax.nn.softmax(self.gate(flat).astype(jnp.float32), axis=-1)
        share, chosen = jax.lax.top_k(probabilities, config.experts_per_token)  # [N, k] each
        if config.normalize_experts:
            share = share / share.sum(axis=-1, keepdims=True)
        # 2. Sorted by expert, the tokens of one expert are one matrix product.
        order = jnp.argsort(chosen.reshape(-1))
        token, sizes = order // config.experts_per_token, jnp.bincount(chosen.reshape(-1), length=config.experts)
        gathered = flat[token]
        inner = _ACTIVATIONS[config.activation](mlp.gate_proj(gathered, sizes)) * mlp.up_proj(gathered, sizes)
        # 3. Weighted, and back at their tokens.
        out = mlp.down_proj(inner, sizes) * share.reshape(-1)[order].astype(x.dtype)[:, None]
        return jnp.zeros_like(flat).at[token].add(out).reshape(x.shape)


class Layer(nnx.Module):
    """Attention and MLP, each normed and added to the residual.

    Under Hugging Face's name `post_attention_layernorm` most families have the MLP's norm; those with `post_norms` have
    the norm of the attention's output.
    """

    def __init__(self, config: DecoderConfig):
        new_norm = partial(Norm, config, config.hidden_size)
        self.config = config
        self.self_attn = Attention(config)
        self.mlp = Mixture(config) if config.experts else MLP(config)
        self.post_attention_layernorm = new_norm()
        if config.pre_norms:
            self.input_layernorm = new_norm()
        if config.post_norms:
            self.post_feedforward_layernorm = new_norm()
        if config.pre_norms and config.post_norms:
            self.pre_feedforward_layernorm = new_norm()

    def attention_input(self, x: jax.Array, turn: Turn) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute queries, keys and values; see `Attention.heads`."""
        return self.self_attn.heads(self.input_layernorm(x) if self.config.pre_norms else x, turn)

    def rest(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Compute the layer's output from its input x [R, T, D] and what its heads attended to, [R, T, H, head_dim]."""
        config = self.config
        mixed = self.self_attn.o_proj(attended.reshape(*attended.shape[:2], -1))
        # Both branches read the same residual.
        if config.parallel:
            return x + mixed + self.mlp(self.post_attention_layernorm(x))
        # A norm before each branch only, as in Llama.
        if not config.post_norms:
            x = x + self._scaled(mixed)
            return x + self._scaled(self.mlp(self.post_attention_layernorm(x)))
        # A norm behind each branch, as in Gemma (which has those before, too) and OLMo 2.
        x = x + self.post_attention_layernorm(mixed)
        inner = self.mlp(self.pre_feedforward_layernorm(x) if config.pre_norms else x)
        return x + self.post_feedforward_layernorm(inner)

    def _scaled(self, branch: jax.Array) -> jax.Array:
        scale = self.config.residual_scale
        return branch if scale == 1.0 else branch * jnp.asarray(scale, branch.dtype)

    def __call__(self, x: jax.Array, turn: Turn, attend: Attend) -> jax.Array:
        return self.rest(x, attend(*self.attention_input(x, turn)))
