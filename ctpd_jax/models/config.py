"""What a decoder computes, as features: a window, a norm's offset, a soft cap; never the name of a family.

A family is no more than a reading of its config.json: see `hf/families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ctpd_jax.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: frequencies theta ** (-2i / rotary_dim), then scaled.

    `scaling` is "default" (none), "linear" (every frequency divided by `factor`), "llama3" (long wavelengths divided by
    `factor`, short ones kept, a ramp between them; Llama 3.1), "yarn" (likewise, the ramp over the dimensions, cosines
    and sines multiplied by `amplitude`; OLMo 3, arXiv 2309.00071) or "longrope" (every frequency divided by its own
    entry of `short_factor`, with an `amplitude` too; Phi-3). The long factors of "longrope" begin past the original
    context, which no row here may exceed: they are kept only to be written again.
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float | None = 1.0
    low_freq_factor: float = 1.0  # this and the next belong to "llama3"
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    short_factor: tuple[float, ...] = ()  # this and the next belong to "longrope"
    long_factor: tuple[float, ...] = ()
    amplitude: float = 1.0
    beta_fast: float = 32.0  # turns over the original context: "yarn" keeps what turns more often than this,
    beta_slow: float = 1.0  # and divides what turns less often than this
    query_beta: float = 0.0  # queries grow beyond the original context, which no row may exceed then (Ministral 3)


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer."""

    rope: Rope | None = Rope()  # None: no positions at all (some layers of SmolLM3)
    window: int | None = None  # a query sees keys less than `window` positions back; None: all of them


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside some matrices: y = x W^T + (alpha / rank) (x A^T) B^T, with A [rank, in], B [out, rank].

    `targets` are the names of linear modules, such as "q_proj" (arXiv 2106.09685).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model. Frozen and hashable: it is a static argument of the jitted functions.

    Sizes are counts; `attention_scale` multiplies the query-key products (1/sqrt(head_dim) for most models). An "rms"
    norm computes x / rms(x) * (norm_offset + weight), a "layer" norm also subtracts the mean and adds a bias.
    `pre_norms` are those before the attention and before the MLP, `post_norms` those after each of them, before it
    joins the residual. With `parallel` both read the same residual: x + attention(norm(x)) + mlp(norm(x)).
    """

    family: str  # Hugging Face's model_type: only the rooms of `hf/` ask for it
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
    rotary_dim: int | None = None  # the first dimensions of a head, which turn with the position; None: all
    norm: str = "rms"  # "rms" or "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    activation: str = "silu"  # "silu", "gelu" or "gelu_tanh"
    gated: bool = True  # the MLP is down(act(gate(x)) * up(x)); else down(act(up(x)))
    tied: bool = False  # the unembedding is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head": over each head's dimensions; "all": over those of all heads together
    fused_qkv: str | None = None  # one matrix for queries, keys, values; its rows by "blocks" (q | k | v) or by "heads"
    fused_mlp: bool = False  # one matrix for gate and up, in this order
    experts: int = 0  # a mixture of so many MLPs; 0: one MLP
    experts_per_token: int = 0
    normalize_experts: bool = True  # the chosen experts' weights sum to one
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add to the residual
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    max_positions: int = 2048
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    lora: Lora | None = None
    int8: bool = False  # the layers' matrices are rounded to int8, with a scale for every output: hf.load.rounded

    def __post_init__(self) -> None:
        # What no single field can tell. The names are those of config.json, which is where people meet them.
        if len(self.layer_kinds) != self.num_layers:
            raise UserError(f"The config names {len(self.layer_kinds)} layer types for {self.num_layers} layers.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})."
            )
        if self.experts_per_token > self.experts:
            raise UserError(
                f"num_experts_per_tok ({self.experts_per_token}) is more than the experts ({self.experts})."
            )
        if self.turned % 2 or not 0 < self.turned <= self.head_dim:
            raise UserError(
                f"Rotary positions need an even number of dimensions, at most head_dim ({self.head_dim}), not "
                f"{self.turned}."
            )

    @property
    def turned(self) -> int:
        """Return how many dimensions of a head turn with the position."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def longest(self) -> int:
        """Return the most positions that a row may have here."""
        ropes = [kind.rope for kind in self.kinds if kind.rope is not None]
        within = [rope for rope in ropes if rope.scaling == "longrope" or rope.query_beta]
        return min([self.max_positions, *(rope.original_max_positions for rope in within)])
