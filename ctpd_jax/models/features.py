"""What each family has beyond a plain Llama: features out of its config.json, and its config.json out of them.

For every family a reader and a writer, put together in `families.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig, LayerKind, Rope
from ctpd_jax.models.hf_fields import Fields, both_spellings, longrope_amplitude, rope_of, write_rope

Features = dict[str, Any]  # arguments of DecoderConfig


@dataclass(frozen=True)
class Shape:
    """What `hf_config` has read before it asks the family."""

    hidden: int
    heads: int
    layers: int
    positions: int


# ------------------------------------------------------------------------------------------------ layers and ropes


def _spellings(fields: Fields) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """`rope_parameters`, and `rope_scaling` as `rope_of` wants it: a null that stands in the file says "none"."""
    old = fields.or_null("rope_scaling")
    return fields.or_null("rope_parameters"), {} if old is None and "rope_scaling" in fields.raw else old


def _one_rope(fields: Fields, shape: Shape) -> Rope:
    """The rotary parameters of a model whose layers share them."""
    return rope_of(fields, *_spellings(fields), "rope_theta", 10_000.0, shape.positions)


def _kinds(layers: Sequence[LayerKind]) -> Features:
    """Layers one by one -> the distinct kinds, and the kind of each layer."""
    kinds = tuple(dict.fromkeys(layers))
    return {"kinds": kinds, "layer_kinds": tuple(kinds.index(layer) for layer in layers)}


def _alike(layer: LayerKind, shape: Shape) -> Features:
    return {"kinds": (layer,), "layer_kinds": (0,) * shape.layers}


def _sliding(fields: Fields, default: Sequence[bool]) -> list[bool]:
    """Which layers have a window, by `layer_types`."""
    types = fields.take("layer_types", ["sliding_attention" if one else "full_attention" for one in default])
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UserError(f"{fields.where}: layer type {name!r} is not supported.")
    if len(types) != len(default):
        raise UserError(f"{fields.where}: layer_types has {len(types)} entries for {len(default)} layers.")
    return [name == "sliding_attention" for name in types]


def _windowed(fields: Fields, sliding: Sequence[bool], window: int | None) -> list[int | None]:
    """Each layer's window, by `_sliding`."""
    if any(sliding) and window is None:
        raise UserError(
            f"{fields.where}: layer_types names layers with a window, but there is none (sliding_window, "
            f"use_sliding_window)."
        )
    return [window if one else None for one in sliding]


def _layer_types(config: DecoderConfig) -> list[str]:
    windows = [config.kinds[kind].window for kind in config.layer_kinds]
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def _window(config: DecoderConfig) -> int | None:
    return next((kind.window for kind in config.kinds if kind.window is not None), None)


def _biases(fields: Fields) -> Features:
    bias = fields.take("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias}


# ------------------------------------------------------------------------------------------------ Llama and its like


def read_llama(fields: Fields, shape: Shape) -> Features:
    layers = _alike(LayerKind(_one_rope(fields, shape)), shape)
    return layers | _biases(fields) | {"mlp_bias": fields.take("mlp_bias", False)}


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {"mlp_bias": config.mlp_bias, "attention_bias": config.qkv_bias} | both_spellings(_rope(config))


def _rope(config: DecoderConfig) -> Rope:
    return next((kind.rope for kind in config.kinds if kind.rope is not None), Rope())


def read_smollm3(fields: Fields, shape: Shape) -> Features:
    """Every fourth layer has no positions; with `use_sliding_window` these layers also have a window."""
    rope, interval = _one_rope(fields, shape), fields.take("no_rope_layer_interval", 4)
    turned = fields.take("no_rope_layers", [(i + 1) % interval != 0 for i in range(shape.layers)])  # 1: has positions
    window = fields.or_null("sliding_window") if fields.take("use_sliding_window", False) else None
    fields.ignore("sliding_window", "max_window_layers")
    sliding = _sliding(fields, [window is not None and not one for one in turned])
    if len(turned) != len(sliding):
        raise UserError(f"{fields.where}: no_rope_layers has {len(turned)} entries, layer_types {len(sliding)}.")
    layers = [LayerKind(rope if t else None, w) for t, w in zip(turned, _windowed(fields, sliding, window))]
    return _kinds(layers) | _biases(fields) | {"mlp_bias": fields.take("mlp_bias", False)}


def write_smollm3(config: DecoderConfig) -> dict[str, Any]:
    turned = [int(config.kinds[kind].rope is not None) for kind in config.layer_kinds]
    return write_llama(config) | _write_windows(config) | {"no_rope_layers": turned}


def read_mistral(fields: Fields, shape: Shape) -> Features:
    return _alike(LayerKind(_one_rope(fields, shape), fields.or_null("sliding_window")), shape)


def write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": _window(config)} | both_spellings(_rope(config))


# ------------------------------------------------------------------------------------------------ Qwen


def _qwen_layers(fields: Fields, shape: Shape) -> Features:
    """The layers from `max_window_layers` on have a window, if windows are used at all."""
    rope, first = _one_rope(fields, shape), fields.take("max_window_layers", 28)
    window = fields.or_null("sliding_window", 4096) if fields.take("use_sliding_window", False) else None
    fields.ignore("sliding_window")
    sliding = _sliding(fields, [window is not None and i >= first for i in range(shape.layers)])
    return _kinds([LayerKind(rope, one) for one in _windowed(fields, sliding, window)])


def read_qwen2(fields: Fields, shape: Shape) -> Features:
    return _qwen_layers(fields, shape) | {"qkv_bias": True}


def read_qwen3(fields: Fields, shape: Shape) -> Features:
    return _qwen_layers(fields, shape) | _biases(fields) | {"qk_norm": "head"}


def _write_windows(config: DecoderConfig) -> dict[str, Any]:
    window = _window(config)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": _layer_types(config),
    }


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return _write_windows(config) | {"max_window_layers": config.num_layers} | both_spellings(_rope(config))


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return write_qwen2(config) | {"attention_bias": config.qkv_bias}


# ------------------------------------------------------------------------------------------------ Gemma


def _read_gemma(fields: Fields, shape: Shape) -> Features:
    fields.ignore("hidden_act", "sliding_window_size")  # stand in the files, and are not read for this family
    return _biases(fields) | {
        "attention_scale": fields.take("query_pre_attn_scalar", 256) ** -0.5,
        "norm_offset": 1.0,
        "post_norms": True,
        "embed_scale": float(shape.hidden) ** 0.5,
        "final_softcap": fields.or_null("final_logit_softcapping"),
    }


def read_gemma2(fields: Fields, shape: Shape) -> Features:
    rope, window = _one_rope(fields, shape), fields.or_null("sliding_window", 4096)
    sliding = _sliding(fields, [i % 2 == 0 for i in range(shape.layers)])
    layers = _kinds([LayerKind(rope, one) for one in _windowed(fields, sliding, window)])
    return layers | _read_gemma(fields, shape) | {"attention_softcap": fields.or_null("attn_logit_softcapping", 50.0)}


def read_gemma3(fields: Fields, shape: Shape) -> Features:
    """Sliding layers have a rotary base of their own; in the old spelling `rope_scaling` is the full layers' alone."""
    if fields.take("attn_logit_softcapping", None) is not None:
        # transformers reads the field and then ignores it for this family: no choice would be right for everybody.
        raise UserError(f"{fields.where}: attn_logit_softcapping of a Gemma 3 is not supported; set it to null.")
    new, old = _spellings(fields)
    if unknown := set(new or {}) - {"sliding_attention", "full_attention"}:
        raise UserError(f"{fields.where}: rope_parameters has {sorted(unknown)}; expected one entry per layer type.")
    by_layer = Fields(new or {}, f"{fields.where}: rope_parameters")
    local, full = by_layer.or_null("sliding_attention"), by_layer.or_null("full_attention")
    if new and not full:  # an entry that says nothing still stands against `rope_scaling`
        full = {"rope_type": "default"}
    local_rope = rope_of(fields, local, None, "rope_local_base_freq", 10_000.0, shape.positions)
    full_rope = rope_of(fields, full, old, "rope_theta", 1_000_000.0, shape.positions)
    window, pattern = fields.or_null("sliding_window", 4096), fields.take("sliding_window_pattern", 6)
    sliding = _sliding(fields, [(i + 1) % pattern != 0 for i in range(shape.layers)])
    windows = _windowed(fields, sliding, window)
    layers = _kinds([LayerKind(local_rope if one else full_rope, window) for one, window in zip(sliding, windows)])
    return layers | _read_gemma(fields, shape) | {"qk_norm": "head"}


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": _integral(config.attention_scale**-2),
        "final_logit_softcapping": config.final_softcap,
        "use_bidirectional_attention": False,
        "layer_types": _layer_types(config),
        "sliding_window": _window(config) or 4096,
        "attn_logit_softcapping": config.attention_softcap,
    }


def write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return _write_gemma(config) | both_spellings(_rope(config))


def write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    local = next((kind.rope for kind in config.kinds if kind.window is not None), None) or Rope()
    full = next((kind.rope for kind in config.kinds if kind.window is None), None) or Rope(1_000_000.0)
    return _write_gemma(config) | {
        "rope_parameters": {
            "sliding_attention": {"rope_theta": local.theta, **write_rope(local)},
            "full_attention": {"rope_theta": full.theta, **write_rope(full)},
        },
        "rope_theta": full.theta,
        "rope_local_base_freq": local.theta,
        "rope_scaling": None if full.scaling == "default" else write_rope(full),
    }


def _integral(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 else value


# ------------------------------------------------------------------------------------------------ Phi-3, OLMo 2, NeoX


def _partial(
    fields: Fields, ropes: Sequence[dict[str, Any] | None], name: str, default: float, shape: Shape
) -> int | None:
    """How many dimensions of a head turn: a share that stands in the rotary parameters, or beside them as `name`.

    Raises:
        UserError: it stands in several places, and differs.
    """
    inside = [Fields(rope, fields.where).or_null("partial_rotary_factor") for rope in ropes if rope]
    stated = [share for share in (*inside, fields.or_null(name)) if share is not None] or [default]
    # Beside them, transformers reads no other name: what stands there must be the same.
    shares = {*stated, fields.take("partial_rotary_factor", stated[0])}
    if len(shares) > 1:
        raise UserError(
            f"{fields.where}: {name} and the partial_rotary_factor of the rotary parameters differ: {sorted(shares)}."
        )
    head_dim = shape.hidden // shape.heads
    if fields.take("head_dim", head_dim) != head_dim:
        raise UserError(f"{fields.where}: a head_dim other than hidden_size / num_attention_heads is not supported.")
    turned = int(head_dim * shares.pop())
    return None if turned == head_dim else turned


def _without_partial(rope: dict[str, Any] | None) -> dict[str, Any] | None:
    return rope and {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


def read_phi3(fields: Fields, shape: Shape) -> Features:
    spellings = _spellings(fields)
    original = fields.take("original_max_position_embeddings")
    new, old = map(_without_partial, spellings)
    rope = rope_of(fields, new, old, "rope_theta", 10_000.0, shape.positions, original)
    rotary_dim = _partial(fields, spellings, "partial_rotary_factor", 1.0, shape)
    half = (rotary_dim or shape.hidden // shape.heads) // 2
    if rope.scaling == "longrope" and not len(rope.short_factor) == len(rope.long_factor) == half:
        raise UserError(f"{fields.where}: short_factor and long_factor must have {half} entries each.")
    layers = _alike(LayerKind(rope, fields.or_null("sliding_window")), shape)
    return layers | {"rotary_dim": rotary_dim, "fused_qkv": "blocks", "fused_mlp": True}


def write_phi3(config: DecoderConfig) -> dict[str, Any]:
    rope, share = _rope(config), config.turned / config.head_dim
    long = rope.scaling == "longrope"
    original = rope.original_max_positions if long else config.max_positions
    raw = both_spellings(rope)
    raw["rope_parameters"]["partial_rotary_factor"] = share
    if long and rope.amplitude != longrope_amplitude(config.max_positions / original, original):
        # In both places: version 5 prefers `rope_scaling`, and version 4 has no such entry and refuses it by name.
        for place in ("rope_parameters", "rope_scaling"):
            raw[place]["attention_factor"] = rope.amplitude
    return raw | {
        "sliding_window": _window(config),
        "original_max_position_embeddings": original,
        "partial_rotary_factor": share,
    }


def read_olmo2(fields: Fields, shape: Shape) -> Features:
    layers = _alike(LayerKind(_one_rope(fields, shape)), shape)
    return layers | _biases(fields) | {"pre_norms": False, "post_norms": True, "qk_norm": "all"}


def write_olmo2(config: DecoderConfig) -> dict[str, Any]:
    raw = {"attention_bias": config.qkv_bias} | both_spellings(_rope(config))
    if raw["rope_scaling"]:  # version 4 looks for "type" in this family
        raw["rope_scaling"] = {"type": raw["rope_scaling"].pop("rope_type"), **raw["rope_scaling"]}
    return raw


def read_neox(fields: Fields, shape: Shape) -> Features:
    spellings = _spellings(fields)
    new, old = map(_without_partial, spellings)
    rope = rope_of(fields, new, old, "rotary_emb_base", 10_000.0, shape.positions)
    if fields.take("rope_theta", rope.theta) != rope.theta:
        raise UserError(f"{fields.where}: rope_theta is not read for this family, and differs from the base that is.")
    return (
        _alike(LayerKind(rope), shape)
        | _biases(fields)
        | {
            "mlp_bias": True,
            "norm": "layer",
            "norm_eps": fields.take("layer_norm_eps", 1e-5),
            "parallel": fields.take("use_parallel_residual", True),
            "rotary_dim": _partial(fields, spellings, "rotary_pct", 0.25, shape),
            "fused_qkv": "heads",
            "gated": False,
        }
    )


def write_neox(config: DecoderConfig) -> dict[str, Any]:
    rope, share = _rope(config), config.turned / config.head_dim
    raw = both_spellings(rope)
    raw["rope_parameters"]["partial_rotary_factor"] = share
    return raw | {
        "attention_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "rotary_pct": share,
        "rotary_emb_base": rope.theta,
    }


# ------------------------------------------------------------------------------------------------ mixtures of experts


def read_mixtral(fields: Fields, shape: Shape) -> Features:
    return read_mistral(fields, shape) | {
        "experts": fields.take("num_local_experts", 8),
        "experts_per_token": fields.take("num_experts_per_tok", 2),
    }


def write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    return write_mistral(config) | {
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def read_qwen3_moe(fields: Fields, shape: Shape) -> Features:
    experts = fields.take("num_experts", fields.take("num_local_experts", 128))
    if fields.take("num_local_experts", experts) != experts:
        raise UserError(f"{fields.where}: num_experts and num_local_experts differ; remove one.")
    if fields.take("decoder_sparse_step", 1) != 1 or fields.take("mlp_only_layers", []):
        raise UserError(
            f"{fields.where}: layers without experts among layers with them (decoder_sparse_step, mlp_only_layers) are "
            f"not supported."
        )
    window = fields.or_null("sliding_window", 4096) if fields.take("use_sliding_window", False) else None
    fields.ignore("sliding_window", "max_window_layers", "intermediate_size")
    layers = _alike(LayerKind(_one_rope(fields, shape), window), shape)
    mixture = {"experts": experts, "experts_per_token": fields.take("num_experts_per_tok", 8)}
    mixture["normalize_experts"] = fields.take("norm_topk_prob", False)
    return layers | _biases(fields) | mixture | {"qk_norm": "head"}


def write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    window = _window(config)
    return both_spellings(_rope(config)) | {
        "attention_bias": config.qkv_bias,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalize_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }
