"""What the fields of a family's config.json mean, as features of the decoder: a function for each family.

The table of families, `families.py`, says which function reads which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.models.config import LayerKind, Rope
from ctpd_jax.models.hf.fields import Entry, Fields, read_rope, rope_spellings

Features = dict[str, Any]  # arguments of DecoderConfig

# ------------------------------------------------------------------------------------------------ layers and ropes


def _layers(layers: Sequence[LayerKind]) -> Features:
    """Turn layers one by one into the distinct kinds, and the kind of each layer."""
    kinds = tuple(dict.fromkeys(layers))
    return {"kinds": kinds, "layer_kinds": tuple(kinds.index(layer) for layer in layers)}


def _alike(fields: Fields, layer: LayerKind) -> Features:
    return _layers([layer] * fields.take("num_hidden_layers"))


def _windows(fields: Fields, default: Sequence[bool], window: int | None) -> list[int | None]:
    """Return each layer's window by `layer_types`; by `default`, which layers have one, where the file has none."""
    types = fields.take("layer_types", ["sliding_attention" if one else "full_attention" for one in default])
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UserError(f"{fields.where}: layer type {name!r} is not supported.")
    if len(types) != len(default):
        raise UserError(f"{fields.where}: layer_types has {len(types)} entries for {len(default)} layers.")
    if window is None and "sliding_attention" in types:
        raise UserError(
            f"{fields.where}: layer_types names layers with a window, but there is none (sliding_window, "
            f"use_sliding_window)."
        )
    return [window if name == "sliding_attention" else None for name in types]


def _window_if_used(fields: Fields, default: int | None = 4096) -> int | None:
    """Return the window of families that have one only with `use_sliding_window`."""
    window = fields.or_null("sliding_window", default) if fields.take("use_sliding_window", False) else None
    fields.ignore("sliding_window", "max_window_layers")
    return window


def _biases(fields: Fields) -> Features:
    bias = fields.take("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias}


def _turned(fields: Fields, ropes: Sequence[Entry], name: str, default: float) -> int | None:
    """Return how many dimensions of a head turn: a share in the rotary parameters, or beside them as `name`.

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
    head_dim = fields.take("hidden_size") // fields.take("num_attention_heads")
    if fields.take("head_dim", head_dim) != head_dim:
        raise UserError(f"{fields.where}: a head_dim other than hidden_size / num_attention_heads is not supported.")
    turned = int(head_dim * shares.pop())
    return None if turned == head_dim else turned


def _without_share(ropes: tuple[Entry, Entry]) -> tuple[Entry, Entry]:
    new, old = (rope and {key: rope[key] for key in rope if key != "partial_rotary_factor"} for rope in ropes)
    return new, old


# ------------------------------------------------------------------------------------------------ readers


def llama(fields: Fields) -> Features:
    layers = _alike(fields, LayerKind(read_rope(fields)))
    return layers | _biases(fields) | {"mlp_bias": fields.take("mlp_bias", False)}


def smollm3(fields: Fields) -> Features:
    """Every fourth layer has no positions; with `use_sliding_window` these layers also have a window."""
    rope, interval, count = (
        read_rope(fields),
        fields.take("no_rope_layer_interval", 4),
        fields.take("num_hidden_layers"),
    )
    turned = fields.take("no_rope_layers", [(i + 1) % interval != 0 for i in range(count)])  # 1: has positions
    window = _window_if_used(fields, None)
    windows = _windows(fields, [window is not None and not one for one in turned], window)
    layers = _layers([LayerKind(rope if one else None, window) for one, window in zip(turned, windows)])
    return layers | _biases(fields) | {"mlp_bias": fields.take("mlp_bias", False)}


def mistral(fields: Fields) -> Features:
    return _alike(fields, LayerKind(read_rope(fields), fields.or_null("sliding_window")))


def granite(fields: Fields) -> Features:
    """Llama with a factor for what is embedded, attended to, added, and unembedded."""
    return llama(fields) | {
        "embed_scale": float(fields.take("embedding_multiplier", 1.0)),
        "attention_scale": float(fields.take("attention_multiplier", 1.0)),
        "residual_scale": float(fields.take("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / fields.take("logits_scaling", 1.0),
    }


def qwen2(fields: Fields) -> Features:
    """The layers from `max_window_layers` on have a window, if windows are used at all."""
    rope, first = read_rope(fields), fields.take("max_window_layers", 28)
    window = _window_if_used(fields)
    default = [window is not None and i >= first for i in range(fields.take("num_hidden_layers"))]
    return _layers([LayerKind(rope, one) for one in _windows(fields, default, window)]) | {"qkv_bias": True}


def qwen3(fields: Fields) -> Features:
    return qwen2(fields) | _biases(fields) | {"qk_norm": "head"}


def _gemma(fields: Fields) -> Features:
    fields.ignore("hidden_act", "sliding_window_size")  # stand in the files, and are not read for this family
    return _biases(fields) | {
        "attention_scale": fields.take("query_pre_attn_scalar", 256) ** -0.5,
        "norm_offset": 1.0,
        "post_norms": True,
        "embed_scale": float(fields.take("hidden_size")) ** 0.5,
        "final_softcap": fields.or_null("final_logit_softcapping"),
    }


def gemma2(fields: Fields) -> Features:
    rope, window = read_rope(fields), fields.or_null("sliding_window", 4096)
    windows = _windows(fields, [i % 2 == 0 for i in range(fields.take("num_hidden_layers"))], window)
    layers = _layers([LayerKind(rope, one) for one in windows])
    return layers | _gemma(fields) | {"attention_softcap": fields.or_null("attn_logit_softcapping", 50.0)}


def gemma3(fields: Fields) -> Features:
    """Sliding layers have a rotary base of their own; in the old spelling `rope_scaling` is the full layers' alone."""
    if fields.take("attn_logit_softcapping", None) is not None:
        # transformers reads the field and then ignores it for this family: no choice would be right for everybody.
        raise UserError(f"{fields.where}: attn_logit_softcapping of a Gemma 3 is not supported; set it to null.")
    # In the old spelling either kind of layer has a base; every sixth sees everything.
    ropes = _ropes_by_layer(fields, "rope_local_base_freq", 10_000.0, 1_000_000.0)
    layers = _every_nth_sees_all(fields, *ropes, fields.take("sliding_window_pattern", 6))
    return layers | _gemma(fields) | {"qk_norm": "head"}


def _ropes_by_layer(fields: Fields, local_name: str, local_theta: float, full_theta: float) -> tuple[Rope, Rope]:
    """Return the ropes of sliding and of full layers; `local_name` is where the old spelling has the former's base."""
    # 1. The rotary parameters, one entry for each kind of layer.
    new, old = rope_spellings(fields)
    if unknown := set(new or {}) - {"sliding_attention", "full_attention"}:
        raise UserError(f"{fields.where}: rope_parameters has {sorted(unknown)}; expected one entry per layer type.")
    by_layer = Fields(new or {}, f"{fields.where}: rope_parameters")
    local, full = by_layer.or_null("sliding_attention"), by_layer.or_null("full_attention")
    if new and not full:  # an entry that says nothing still stands against `rope_scaling`
        full = {"rope_type": "default"}
    # 2. Each held against the old spelling, whose scaling is that of the full ones.
    local_rope = read_rope(fields, (local, None), local_name, local_theta)
    return local_rope, read_rope(fields, (full, old), theta=full_theta)


def _every_nth_sees_all(fields: Fields, local: Rope, full: Rope, n: int) -> Features:
    window = fields.or_null("sliding_window", 4096)
    windows = _windows(fields, [(i + 1) % n != 0 for i in range(fields.take("num_hidden_layers"))], window)
    return _layers([LayerKind(full if one is None else local, one) for one in windows])


def phi3(fields: Fields) -> Features:
    # The share of a head that turns stands among the rotary parameters, or beside them.
    spellings, original = rope_spellings(fields), fields.take("original_max_position_embeddings")
    rope = read_rope(fields, _without_share(spellings), original=original)
    rotary_dim = _turned(fields, spellings, "partial_rotary_factor", 1.0)
    half = (rotary_dim or fields.take("hidden_size") // fields.take("num_attention_heads")) // 2
    if rope.scaling == "longrope" and not len(rope.short_factor) == len(rope.long_factor) == half:
        raise UserError(f"{fields.where}: short_factor and long_factor must have {half} entries each.")
    layers = _alike(fields, LayerKind(rope, fields.or_null("sliding_window")))
    return layers | {"rotary_dim": rotary_dim, "fused_qkv": "blocks", "fused_mlp": True}


def olmo2(fields: Fields) -> Features:
    layers = _alike(fields, LayerKind(read_rope(fields)))
    return layers | _biases(fields) | {"pre_norms": False, "post_norms": True, "qk_norm": "all"}


def olmo3(fields: Fields) -> Features:
    """OLMo 2 with windows; every fourth layer sees everything, and its rope alone is scaled."""
    local, full = _ropes_by_layer(fields, "rope_theta", 500_000.0, 500_000.0)
    if local.scaling != "default" or local.theta != full.theta:
        # Version 4 of transformers has one base for both, and no scaling of the sliding layers.
        raise UserError(f"{fields.where}: OLMo 3 with another rope in its sliding layers is not supported.")
    layers = _every_nth_sees_all(fields, local, full, 4)
    return layers | _biases(fields) | {"pre_norms": False, "post_norms": True, "qk_norm": "all"}


def exaone4(fields: Fields) -> Features:
    """Where some layers have a window, the others have no positions."""
    rope, window, count = read_rope(fields), fields.or_null("sliding_window", 4096), fields.take("num_hidden_layers")
    default = [False] * count
    if fields.or_null("layer_types") is not None or window is None:
        fields.ignore("sliding_window_pattern")  # "LLLG" in the files
    else:
        pattern = fields.take("sliding_window_pattern", 4)
        default = [(i + 1) % pattern != 0 for i in range(count)]
    windows = _windows(fields, default, window)
    layers = _layers([LayerKind(rope if window is None or one is not None else None, one) for one in windows])
    return layers | {"pre_norms": False, "post_norms": True, "qk_norm": "head"}


def neox(fields: Fields) -> Features:
    spellings = rope_spellings(fields)
    rope = read_rope(fields, _without_share(spellings), "rotary_emb_base")
    # Its base has another name; one that stands under the usual name may only repeat it.
    if fields.take("rope_theta", rope.theta) != rope.theta:
        raise UserError(f"{fields.where}: rope_theta is not read for this family, and differs from the base that is.")
    features = _alike(fields, LayerKind(rope)) | _biases(fields)
    return features | {
        "mlp_bias": True,
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps", 1e-5),
        "parallel": fields.take("use_parallel_residual", True),
        "rotary_dim": _turned(fields, spellings, "rotary_pct", 0.25),
        "fused_qkv": "heads",
        "gated": False,
    }


def mixtral(fields: Fields) -> Features:
    experts = {"experts": fields.take("num_local_experts", 8)}
    return mistral(fields) | experts | {"experts_per_token": fields.take("num_experts_per_tok", 2)}


def qwen3_moe(fields: Fields) -> Features:
    # Some files have the number of experts under Mixtral's name.
    experts = fields.take("num_experts", fields.take("num_local_experts", 128))
    if fields.take("num_local_experts", experts) != experts:
        raise UserError(f"{fields.where}: num_experts and num_local_experts differ; remove one.")
    if fields.take("decoder_sparse_step", 1) != 1 or fields.take("mlp_only_layers", []):
        raise UserError(
            f"{fields.where}: layers without experts among layers with them (decoder_sparse_step, mlp_only_layers) are "
            f"not supported."
        )
    window = _window_if_used(fields)
    fields.ignore("intermediate_size")
    layers = _alike(fields, LayerKind(read_rope(fields), window))
    mixture = {"experts": experts, "experts_per_token": fields.take("num_experts_per_tok", 8)}
    mixture["normalize_experts"] = fields.take("norm_topk_prob", False)
    return layers | _biases(fields) | mixture | {"qk_norm": "head"}
