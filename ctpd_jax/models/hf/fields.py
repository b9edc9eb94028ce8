"""The fields of a config.json: checked for their kind as they are read, and what nobody reads refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig, Rope

_REQUIRED = object()

# Fields that do not change the logits: notes, training-time settings, and defaults of `generate`.
_HARMLESS = {
    "architectures", "attn_implementation", "auto_map", "cache_implementation", "chunk_size_feed_forward",
    "classifier_dropout", "custom_pipelines", "diversity_penalty", "do_sample", "dtype",
    "dual_chunk_attention_config", "encoder_no_repeat_ngram_size", "finetuning_task", "id2label", "is_llama_config",
    "label2id", "length_penalty", "max_length", "max_sequence_length", "min_length", "neftune_noise_alpha",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "pretraining_tp", "problem_type", "pruned_heads",
    "repetition_penalty", "return_dict", "router_aux_loss_coef", "task_specific_params", "temperature",
    "tokenizer_class", "tokenizer_model_max_length", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache",
}  # fmt: skip
# Settings that the decoder has in one value only. `rope_interleaved` means something in SmolLM's own code alone.
_FIXED = {
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout", "hidden_dropout_prob", "router_jitter_noise"), 0.0),
    **dict.fromkeys(("full_attn_mod", "interpolate_factor"), 1),
    **dict.fromkeys(("is_decoder", "is_encoder_decoder", "add_cross_attention"), False),
    **dict.fromkeys(("use_bidirectional_attention", "rope_interleaved"), False),
    "partial_rotary_factor": 1.0,
}

# ------------------------------------------------------------------------------------------------ kinds of values


def _is_integer(value: Any, least: int = 0) -> bool:
    """Tell an integer from JSON's true, "30" and 30.0, which transformers refuses too."""
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # not NaN either


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


Kind = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is that
_LARGEST, _MOST, _MANY = 1e38, 2**31 - 1, 10_000  # a number, a size, a number of parts that are listed one by one
_SIZE: Kind = (f"a positive integer, at most {_MOST}", lambda value: _is_integer(value, 1) and value <= _MOST)
_PARTS: Kind = (f"a positive integer, at most {_MANY}", lambda value: _is_integer(value, 1) and value <= _MANY)
_COUNT: Kind = ("an integer, 0 or more", _is_integer)
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
_ID: Kind = ("a token id, an integer", lambda value: _is_integer(value, -1))
_IDS: Kind = ("a token id or a list of them, integers", lambda value: _ID[1](value) or _is_list(value, _ID[1]))


# Every field that is read: of config.json, of its rotary parameters and of generation_config.json.
_NAMES_OF_KINDS: tuple[tuple[Kind, str], ...] = (
    (_SIZE, "hidden_size intermediate_size moe_intermediate_size vocab_size head_dim num_attention_heads"),
    (_SIZE, "num_key_value_heads num_experts_per_tok"),
    (_PARTS, "num_hidden_layers num_experts num_local_experts"),
    (_SIZE, "max_position_embeddings original_max_position_embeddings sliding_window_pattern"),
    (_SIZE, "no_rope_layer_interval decoder_sparse_step"),
    (_FLAG, "tie_word_embeddings attention_bias mlp_bias use_sliding_window use_parallel_residual"),
    (_FLAG, "norm_topk_prob truncate"),
    (_POSITIVE, "query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping"),
    (_POSITIVE, "rope_theta rope_local_base_freq rotary_emb_base"),
    (_POSITIVE, "factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow"),
    (_POSITIVE, "embedding_multiplier attention_multiplier residual_multiplier logits_scaling"),
    (_NUMBER, "llama_4_scaling_beta mscale mscale_all_dim rms_norm_eps layer_norm_eps initializer_range"),
    (_SHARE, "partial_rotary_factor rotary_pct"),
    (_TEXT, "hidden_act hidden_activation rope_type type model_type"),
    (_OBJECT, "rope_parameters rope_scaling full_attention sliding_attention text_config"),
    (_NUMBERS, "short_factor long_factor"),
    (_ID, "bos_token_id pad_token_id"),
    (_IDS, "eos_token_id"),
    (("a positive integer, or null for none", _SIZE[1]), "sliding_window"),
    (_COUNT, "max_window_layers"),
    (_NAMES, "layer_types"),
    (_SWITCHES, "no_rope_layers"),
    (("a list of integers", lambda value: _is_list(value, _is_integer)), "mlp_only_layers"),
)
_KINDS: dict[str, Kind] = {name: kind for kind, names in _NAMES_OF_KINDS for name in names.split()}


class Fields:
    """config.json as a mapping that remembers which fields were read, so that the rest can be refused by name."""

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None):
        """Wrap the parsed file `raw`, named `where` in messages; a family's `defaults` precede those of the methods."""
        self.raw, self.where, self.taken = raw, where, set[str]()
        self.defaults = defaults or {}

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return the field's value; a missing one, or null where there is a default, gives the default."""
        value = self.or_null(name)
        if value is not None:
            return value
        default = self.defaults.get(name, default)
        if default is _REQUIRED:
            raise UserError(f"{self.where} has no field {name!r}: it is not a complete model config.")
        return default

    def or_null(self, name: str, default: Any = None) -> Any:
        """Return the field's value, null included: only an absent field gives the default."""
        self.taken.add(name)
        value, (expected, holds) = self.raw.get(name), _KINDS[name]
        if value is not None and not holds(value):
            raise UserError(f"{self.where}: {name} is {_short(value)}, but must be {expected}.")
        return self.raw.get(name, self.defaults.get(name, default))

    def ignore(self, *names: str) -> None:
        """Mark fields as read that mean nothing for this family."""
        self.taken.update(names)

    def refuse_the_rest(self) -> None:
        """Raise UserError for the first field that nobody read and that might change the logits."""
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

Entry = Mapping[str, Any] | None  # of rotary parameters


def rope_spellings(fields: Fields) -> tuple[Entry, Entry]:
    """Return `rope_parameters`, transformers 5's spelling, and `rope_scaling`, that of 4: {} where a null stands."""
    new, old = fields.take("rope_parameters", None), fields.or_null("rope_scaling")
    if old and fields.raw.get("rope_parameters") is None:
        new = None  # the family's default counts where neither says anything
    return new, {} if old is None and "rope_scaling" in fields.raw else old


def read_rope(
    fields: Fields,
    spellings: tuple[Entry, Entry] | None = None,
    theta_name: str = "rope_theta",
    theta: float = 10_000.0,
    original: int | None = None,
) -> Rope:
    """Read rotary parameters in the spelling of transformers 5, of 4, or in both, which then must say the same.

    Args:
        fields: the config.json.
        spellings: those of `rope_spellings` where they are not taken as they stand; None where a spelling says nothing.
        theta_name: what version 4 calls the base.
        theta: the base where the file does not say.
        original: `original_max_position_embeddings` of the model, where its config has that.

    Raises:
        UserError: the two spellings differ.
    """
    # Version 4 does not know `rope_parameters`, and version 5 prefers now one spelling, now the other. Here what the
    # new one says counts; the old one, and a base of its own, may only repeat it.
    new, old = rope_spellings(fields) if spellings is None else spellings
    stated, theta = fields.or_null(theta_name), fields.take(theta_name, theta)
    positions = fields.take("max_position_embeddings")
    rope, differs = _rope_entry(new or old, theta, positions, fields.where, original), None
    if theta_name in fields.raw and stated not in (None, rope.theta):
        differs = f"{theta_name} is {stated}, but rope_theta in rope_parameters or rope_scaling is {rope.theta}"
    elif new and old is not None and _rope_entry(old, rope.theta, positions, fields.where, original) != rope:
        differs = f"rope_parameters is {_short(new)}, but rope_scaling is {_short(old)}"
    if differs:
        raise UserError(f"{fields.where}: {differs}. Versions of transformers disagree on which counts; remove one.")
    return rope


def _rope_entry(raw: Entry, theta: float, positions: int, where: str, original: int | None) -> Rope:
    """Read one entry of `rope_parameters`, or `rope_scaling`; `theta` and `positions` are the model's own."""
    fields = Fields(raw or {}, f"{where}: rope parameters", {"original_max_position_embeddings": original or positions})
    theta = float(fields.take("rope_theta", theta))
    # "su" is what Phi-3 called longrope at first.
    stated = [fields.take(name, None) for name in ("rope_type", "type")]
    kinds = {"longrope" if kind == "su" else kind for kind in stated if kind}
    if len(kinds) > 1:
        raise UserError(f"{fields.where}: rope_type and type differ ({', '.join(sorted(kinds))}); remove one.")
    scaling = kinds.pop() if kinds else "default"
    original_positions = fields.take("original_max_position_embeddings")
    if original not in (None, original_positions):
        raise UserError(
            f"{fields.where}: original_max_position_embeddings is {original_positions} there, and {original} in the "
            f"config itself, which counts; remove the other."
        )
    # Each scaling reads fields of its own; what is left over then belongs to none.
    query = float(fields.take("llama_4_scaling_beta", 0.0))
    if query and scaling != "yarn":
        raise UserError(f"{fields.where}: llama_4_scaling_beta is supported with yarn alone.")
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
    elif scaling == "yarn":
        factor = float(fields.take("factor"))
        betas = float(fields.take("beta_fast", 32.0)), float(fields.take("beta_slow", 1.0))
        if betas[0] <= betas[1] or not fields.take("truncate", True):
            raise UserError(f"{fields.where}: yarn without truncate, or beta_fast below beta_slow, is not supported.")
        if theta <= 1:  # its ramp lies where a logarithm to this base says
            raise UserError(f"{fields.where}: rope_theta is {theta}, but has to be above 1 with yarn.")
        amplitude = yarn_amplitude(fields, factor)
        if fields.take("max_position_embeddings", positions) != positions:
            raise UserError(f"{fields.where}: max_position_embeddings differs from the config's own.")
        rope = Rope(theta, scaling, factor, 1.0, 4.0, original_positions, (), (), amplitude, *betas, query)
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
            f"{where}: rope type {scaling!r} is not supported; supported: default, linear, llama3, yarn, longrope."
        )
    fields.refuse_the_rest()
    return rope


def yarn_amplitude(fields: Fields, factor: float) -> float:
    """Return what cosines and sines are multiplied by: stated, by two scales of the logarithm, or by one (YaRN)."""
    stated = [fields.take(name, None) for name in ("mscale", "mscale_all_dim")]
    above, below = stated if all(stated) else (1.0, 0.0)
    usual = (1 + 0.1 * above * math.log(factor)) / (1 + 0.1 * below * math.log(factor)) if factor > 1 else 1.0
    return float(fields.take("attention_factor", usual))


def longrope_amplitude(factor: float, original: int) -> float:
    """Return LongRoPE's factor of cosines and sines where the config does not say it (arXiv 2402.13753)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def written_ropes(config: DecoderConfig, share: float) -> dict[str, Any]:
    """Return the rotary parameters in the spellings of transformers 4 and 5, since each version reads only its own."""
    ropes = [kind.rope for kind in config.kinds if kind.rope is not None]
    if config.family in ("gemma3_text", "olmo3"):
        # A kind of layer that the model has not still has a base: its family's, or in OLMo 3 that of the other kind.
        bases = (10_000.0, 1_000_000.0) if config.family == "gemma3_text" else (ropes[0].theta, ropes[0].theta)
        local = next((kind.rope for kind in config.kinds if kind.window is not None), None) or Rope(bases[0])
        rope = next((kind.rope for kind in config.kinds if kind.window is None), None) or Rope(bases[1])
        new: dict[str, Any] = {"sliding_attention": _new_rope(local), "full_attention": _new_rope(rope)}
    else:
        local = rope = ropes[0] if ropes else Rope()
        new = _new_rope(rope)
    old = None if rope.scaling == "default" else _written_rope(rope)
    original = rope.original_max_positions if rope.scaling == "longrope" else config.max_positions
    # What single families want besides.
    if config.family in ("phi3", "gpt_neox"):
        new["partial_rotary_factor"] = share
    if config.family == "olmo2" and old:  # version 4 looks for "type" in this family
        old = {"type": old.pop("rope_type"), **old}
    if config.family == "ministral3":
        new["llama_4_scaling_beta"] = rope.query_beta
        new["original_max_position_embeddings"] = original if rope.scaling == "default" else rope.original_max_positions
    if config.family == "phi3" and rope.scaling == "longrope":
        assert old is not None
        if rope.amplitude != longrope_amplitude(config.max_positions / original, original):
            # In both: version 5 prefers `rope_scaling`, and version 4 has no such entry and refuses it by name.
            new["attention_factor"] = old["attention_factor"] = rope.amplitude
    return {
        "rope_parameters": new,
        "rope_theta": rope.theta,
        "rope_scaling": old,
        "rope_local_base_freq": local.theta,
        "rotary_emb_base": rope.theta,
        "original_max_position_embeddings": original,
    }


def _new_rope(rope: Rope) -> dict[str, Any]:
    return {"rope_theta": rope.theta, **_written_rope(rope)}


def _written_rope(rope: Rope) -> dict[str, Any]:
    """Return an entry of `rope_parameters` without its theta, which is what transformers 4 calls `rope_scaling`."""
    if rope.scaling == "longrope":
        # Version 4 has only "type", and refuses any further entry.
        return {"type": "longrope", "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    raw: dict[str, Any] = {"rope_type": rope.scaling}
    if rope.scaling != "default":
        raw["factor"] = rope.factor
    if rope.scaling == "yarn":
        raw |= {"attention_factor": rope.amplitude, "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        raw["original_max_position_embeddings"] = rope.original_max_positions
    if rope.scaling == "llama3":
        raw["low_freq_factor"] = rope.low_freq_factor
        raw["high_freq_factor"] = rope.high_freq_factor
        raw["original_max_position_embeddings"] = rope.original_max_positions
    return raw
