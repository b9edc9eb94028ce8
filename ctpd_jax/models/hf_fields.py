"""The fields of a config.json: taken one by one, and what is left over refused by name; rotary parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.models.config import Rope

_REQUIRED = object()

# Fields that do not change the logits: notes, training-time settings, and defaults of `generate`.
_HARMLESS = {
    "architectures",
    "auto_map",
    "cache_implementation",
    "chunk_size_feed_forward",
    "router_aux_loss_coef",
    "output_router_logits",
    "classifier_dropout",
    "do_sample",
    "dtype",
    "finetuning_task",
    "id2label",
    "is_llama_config",
    "label2id",
    "max_length",
    "min_length",
    "num_beams",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
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


class Fields:
    """config.json as a mapping that remembers what was asked for, so that the rest can be refused by name."""

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None):
        """`defaults` come before those that `take` and `or_null` are given: a family's own."""
        self.raw, self.where, self.taken = raw, where, set[str]()
        self.defaults = defaults or {}

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field's value; a missing one, or null where there is a default, gives the default."""
        self.taken.add(name)
        value = self.raw.get(name)
        if value is not None:
            return value
        default = self.defaults.get(name, default)
        if default is _REQUIRED:
            raise UserError(f"{self.where} has no field {name!r}: it is not a complete model config.")
        return default

    def or_null(self, name: str, default: Any = None) -> Any:
        """The field's value, null included: only an absent field gives the default."""
        self.taken.add(name)
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


def read_rope(raw: Mapping[str, Any] | None, theta: float, positions: int, where: str) -> Rope:
    """One entry of `rope_parameters`, or `rope_scaling`, with `theta` and `positions` of the model as defaults."""
    fields = Fields(raw or {}, f"{where}: rope parameters")
    theta = float(fields.take("rope_theta", theta))
    scaling = fields.take("rope_type", fields.take("type", "default"))
    if scaling == "default":
        rope = Rope(theta)
        fields.ignore("factor")
    elif scaling == "linear":
        rope = Rope(theta, scaling, float(fields.take("factor")))
    elif scaling == "llama3":
        rope = Rope(
            theta,
            scaling,
            float(fields.take("factor")),
            float(fields.take("low_freq_factor")),
            float(fields.take("high_freq_factor")),
            fields.take("original_max_position_embeddings", positions),
        )
    elif scaling in ("longrope", "su"):
        original = fields.take("original_max_position_embeddings", positions)
        factor = float(fields.take("factor", positions / original))
        rope = Rope(
            theta,
            "longrope",
            original_max_positions=original,
            short_factor=tuple(map(float, fields.take("short_factor"))),
            long_factor=tuple(map(float, fields.take("long_factor"))),
            amplitude=float(fields.take("attention_factor", longrope_amplitude(factor, original))),
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
