"""The fields of a config.json: taken one by one, each of its kind, and what is left over refused by name; rotary
parameters in both spellings, held against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.models.config import Rope

_REQUIRED = object()

# Fields that do not change the logits: notes, training-time settings, and defaults of `generate`.
_HARMLESS = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "cache_implementation",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "custom_pipelines",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "dual_chunk_attention_config",
    "encoder_no_repeat_ngram_size",
    "finetuning_task",
    "id2label",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "repetition_penalty",
    "return_dict",
    "router_aux_loss_coef",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "tokenizer_model_max_length",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
_RENAMED = {"su": "longrope"}  # what Phi-3 called it at first
# Settings that the decoder has, in one value only. `rope_interleaved` means something in SmolLM's own code alone.
_FIXED = {
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "router_jitter_noise": 0.0,
    "use_bidirectional_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}


# ------------------------------------------------------------------------------------------------ kinds of values


def is_integer(value: Any, least: int = 0) -> bool:
    """JSON's true and "30" are no integers, and 30.0 is none either: transformers refuses it."""
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


Kind = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is that
_SIZE: Kind = ("a positive integer", lambda value: is_integer(value, 1))
_COUNT: Kind = ("an integer, 0 or more", is_integer)
_FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
_POSITIVE: Kind = ("a number above 0", lambda value: _is_number(value) and value > 0)
_NUMBER: Kind = ("a number, 0 or more", lambda value: _is_number(value) and value >= 0)
_SHARE: Kind = ("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
_TEXT: Kind = ("text", lambda value: isinstance(value, str))
_OBJECT: Kind = ("an object", lambda value: isinstance(value, Mapping))
_NUMBERS: Kind = ("a list of numbers above 0", lambda value: _is_list(value, _POSITIVE[1]))
_NAMES: Kind = ("a list of text", lambda value: _is_list(value, _TEXT[1]))
_SWITCHES: Kind = ("a list of 0 and 1", lambda value: _is_list(value, lambda one: one in (0, 1)))
# -1 stands for "none" in old files.
_ID: Kind = ("a token id, an integer", lambda value: is_integer(value, -1))
_IDS: Kind = ("a token id or a list of them, integers", lambda value: _ID[1](value) or _is_list(value, _ID[1]))


def _all(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


# Every field that is read here: of config.json, of its rotary parameters and of generation_config.json. Null, where it
# may stand, is not asked about.
_KINDS: dict[str, Kind] = {
    **_all(_SIZE, "hidden_size intermediate_size moe_intermediate_size vocab_size num_hidden_layers head_dim"),
    **_all(_SIZE, "num_attention_heads num_key_value_heads num_experts num_local_experts num_experts_per_tok"),
    **_all(_SIZE, "max_position_embeddings original_max_position_embeddings sliding_window_pattern"),
    **_all(_SIZE, "no_rope_layer_interval decoder_sparse_step"),
    **_all(
        _FLAG, "tie_word_embeddings attention_bias mlp_bias use_sliding_window use_parallel_residual norm_topk_prob"
    ),
    **_all(_POSITIVE, "query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping"),
    **_all(_POSITIVE, "rope_theta rope_local_base_freq rotary_emb_base"),
    **_all(_POSITIVE, "factor low_freq_factor high_freq_factor attention_factor"),
    **_all(_NUMBER, "rms_norm_eps layer_norm_eps initializer_range"),
    **_all(_SHARE, "partial_rotary_factor rotary_pct"),
    **_all(_TEXT, "hidden_act hidden_activation rope_type type model_type"),
    **_all(_OBJECT, "rope_parameters rope_scaling full_attention sliding_attention"),
    **_all(_NUMBERS, "short_factor long_factor"),
    **_all(_ID, "bos_token_id pad_token_id"),
    "eos_token_id": _IDS,
    "sliding_window": ("a positive integer, or null for none", _SIZE[1]),
    "max_window_layers": _COUNT,
    "layer_types": _NAMES,
    "no_rope_layers": _SWITCHES,
    "mlp_only_layers": ("a list of integers", lambda value: _is_list(value, is_integer)),
}


class Fields:
    """config.json as a mapping that remembers what was asked for, so that the rest can be refused by name.

    Every value that is asked for is of its field's kind, or refused.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None):
        """`defaults` come before those that `take` and `or_null` are given: a family's own."""
        self.raw, self.where, self.taken = raw, where, set[str]()
        self.defaults = defaults or {}

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field's value; a missing one, or null where there is a default, gives the default."""
        value = self.or_null(name)
        if value is not None:
            return value
        default = self.defaults.get(name, default)
        if default is _REQUIRED:
            raise UserError(f"{self.where} has no field {name!r}: it is not a complete model config.")
        return default

    def or_null(self, name: str, default: Any = None) -> Any:
        """The field's value, null included: only an absent field gives the default."""
        self.taken.add(name)
        value, (expected, holds) = self.raw.get(name), _KINDS[name]
        if value is not None and not holds(value):
            raise UserError(f"{self.where}: {name} is {_short(value)}, but must be {expected}.")
        return self.raw.get(name, self.defaults.get(name, default))

    def ignore(self, *names: str) -> None:
        """Fields that mean nothing here."""
        self.taken.update(names)

    def refuse_the_rest(self) -> None:
        for name, value in self.raw.items():
            if name in self.taken or name.startswith("_") or value is None:
                continue
            if name in _FIXED:
                if value != _FIXED[name]:
                    raise UserError(
                        f"{self.where}: {name} = {value!r} is not supported; only {_FIXED[name]!r} is implemented."
                    )
            elif name not in _HARMLESS and value is not False:
                raise UserError(
                    f"{self.where}: the field {name!r} ({_short(value)}) is not supported and might change what the "
                    f"model computes. If it does not, remove it from config.json."
                )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------ rotary parameters


def rope_of(
    fields: Fields,
    new: Mapping[str, Any] | None,
    old: Mapping[str, Any] | None,
    theta_name: str,
    theta: float,
    positions: int,
    original: int | None = None,
) -> Rope:
    """The rotary parameters in the spelling of transformers 5, of 4, or in both, which then must say the same.

    Version 4 does not know `rope_parameters`, and version 5 prefers now one spelling, now the other.

    Args:
        fields: the config.json that has them.
        new: `rope_parameters`, or its entry for these layers; None or empty where there is none.
        old: `rope_scaling`; empty where the file says null, None where it says nothing about these layers.
        theta_name: what version 4 calls the base, `rope_theta` for most.
        theta: the base where the file does not say.
        positions: of the model.
        original: `original_max_position_embeddings` of the model, where its config has that.

    Raises:
        UserError: the two spellings differ.
    """
    stated, theta = fields.or_null(theta_name), fields.take(theta_name, theta)
    rope, differs = _read_rope(new or old, theta, positions, fields.where, original), None
    if theta_name in fields.raw and stated not in (None, rope.theta):
        differs = f"{theta_name} is {stated}, but rope_theta in rope_parameters or rope_scaling is {rope.theta}"
    elif new and old is not None and _read_rope(old, rope.theta, positions, fields.where, original) != rope:
        differs = f"rope_parameters is {_short(new)}, but rope_scaling is {_short(old)}"
    if differs:
        raise UserError(f"{fields.where}: {differs}. Versions of transformers disagree on which counts; remove one.")
    return rope


def _read_rope(
    raw: Mapping[str, Any] | None, theta: float, positions: int, where: str, original: int | None = None
) -> Rope:
    """One entry of `rope_parameters`, or `rope_scaling`, with `theta` and `positions` of the model as defaults."""
    fields = Fields(raw or {}, f"{where}: rope parameters", {"original_max_position_embeddings": original or positions})
    theta = float(fields.take("rope_theta", theta))
    kinds = {_RENAMED.get(kind, kind) for name in ("rope_type", "type") if (kind := fields.take(name, None))}
    if len(kinds) > 1:
        raise UserError(f"{fields.where}: rope_type and type differ ({', '.join(sorted(kinds))}); remove one.")
    scaling = kinds.pop() if kinds else "default"
    original_positions = fields.take("original_max_position_embeddings")
    if original not in (None, original_positions):
        raise UserError(
            f"{fields.where}: original_max_position_embeddings is {original_positions} there, and {original} in the "
            f"config itself, which counts; remove the other."
        )
    if scaling == "default":
        rope = Rope(theta)
        fields.ignore("factor")
    elif scaling == "linear":
        rope = Rope(theta, scaling, float(fields.take("factor")))
    elif scaling == "llama3":
        low, high = float(fields.take("low_freq_factor")), float(fields.take("high_freq_factor"))
        if low >= high:
            raise UserError(f"{fields.where}: low_freq_factor ({low}) must be below high_freq_factor ({high}).")
        rope = Rope(theta, scaling, float(fields.take("factor")), low, high, original_positions)
    elif scaling == "longrope":
        factor = float(fields.take("factor", positions / original_positions))
        if original and factor != positions / original:
            raise UserError(
                f"{fields.where}: factor is {factor}, but max_position_embeddings / original_max_position_embeddings "
                f"is {positions / original}; remove it."
            )
        rope = Rope(
            theta,
            scaling,
            original_max_positions=original_positions,
            short_factor=tuple(map(float, fields.take("short_factor"))),
            long_factor=tuple(map(float, fields.take("long_factor"))),
            amplitude=float(fields.take("attention_factor", longrope_amplitude(factor, original_positions))),
        )
    else:
        raise UserError(
            f"{where}: rope type {scaling!r} is not supported; supported are default, linear, llama3 and longrope."
        )
    fields.refuse_the_rest()
    return rope


def longrope_amplitude(factor: float, original: int) -> float:
    """What cosines and sines are multiplied by where the config does not say: LongRoPE, arXiv 2402.13753."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def write_rope(rope: Rope) -> dict[str, Any]:
    """An entry of `rope_parameters`, without its theta: what transformers 4 calls `rope_scaling`."""
    if rope.scaling == "longrope":
        # Version 4 has only "type", and refuses any further entry.
        return {"type": "longrope", "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    raw: dict[str, Any] = {"rope_type": rope.scaling}
    if rope.scaling != "default":
        raw["factor"] = rope.factor
    if rope.scaling == "llama3":
        raw["low_freq_factor"] = rope.low_freq_factor
        raw["high_freq_factor"] = rope.high_freq_factor
        raw["original_max_position_embeddings"] = rope.original_max_positions
    return raw


def both_spellings(rope: Rope) -> dict[str, Any]:
    """The rotary parameters of a model with one of them, as transformers 4 and 5 write them."""
    return {
        "rope_parameters": {"rope_theta": rope.theta, **write_rope(rope)},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else write_rope(rope),
    }
