"""What a decoder computes, as features: a window, a norm's offset, a soft cap; never the name of a family.

A family is no more than a reading of its config.json: see `hf_config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ctpd_jax.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: frequencies theta ** (-2i / head_dim), then scaled.

    `scaling` is "default" (none), "linear" (every frequency divided by `factor`) or "llama3" (long wavelengths divided
    by `factor`, short ones kept, a ramp between them; Llama 3.1).
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # the last three belong to "llama3"
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer."""

    rope: Rope = Rope()
    window: int | None = None  # a query sees keys less than `window` positions back; None: all of them


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model. Frozen and hashable: it is a static argument of the jitted functions.

    Sizes are counts; `attention_scale` multiplies the query-key products (1/sqrt(head_dim) for most models). A norm
    computes x / rms(x) * (norm_offset + weight). `post_norms` adds a norm after the attention and one after the MLP,
    before each joins the residual.
    """

    family: str  # Hugging Face's model_type: only `hf_config.to_hf` asks for it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...]  # the distinct kinds of layers
    layer_kinds: tuple[int, ...]  # per layer, an index into `kinds`
    attention_scale: float
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    activation: str = "silu"  # "silu", "gelu" or "gelu_tanh", of the gated MLP
    tied: bool = False  # the unembedding is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    max_positions: int = 2048
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if len(self.layer_kinds) != self.num_layers:
            raise UserError(f"The config names {len(self.layer_kinds)} layer types for {self.num_layers} layers.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary positions, not {self.head_dim}.")
