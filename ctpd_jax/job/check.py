"""What has to hold of a config: every value by itself, and what does not go together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

from ml_collections import ConfigDict

from ctpd_jax.errors import UserError
from ctpd_jax.job.table import (
    CONTRASTIVE,
    STAGES,
    TRAINED,
    base_dtype,
    columns,
    left_out,
    models_here,
    reading_dtype,
    trained_model,
)
from ctpd_jax.settings import MEASURES, default_config

Range = tuple[Callable[[Any], bool], str]  # what has to hold of a value, and what is said where it does not

TEACHERS = ("teacher_sft", "positive")  # of distillation
CHOICES = {
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "attention": ("auto", "plain", "xla", "cudnn", "splash"),
    "platform": ("auto", "cpu", "gpu", "tpu"),
    "teacher.remat": ("auto", "full", "dots", "none"),
    "student.remat": ("auto", "full", "dots", "none"),
    "data.unit": ("character", "byte"),
    "data.ranked": ("best_worst", "all"),
    "rows.layout": ("auto", "response", "shared"),
    "rows.packed": ("auto", "yes", "no"),
    "rows.fewer": ("auto", "yes", "no"),
    "weights.source": ("dpo", "sft", "prompts", "uniform", "random", "dpo_reference"),
    "weights.transform": ("none", "threshold", "scale", "rank", "binary", "mean_one", "agree"),
    "weights.positive_scorer": ("teacher", "student"),
    "weights.negative_scorer": ("teacher", "student"),
    "train.objective": ("ctpd", "regression", "mixed"),
    "train.contrast": ("start", "negative"),
    "train.margin_as": ("label", "offset", "weight", "none"),
    "train.reference": ("teacher", "student", "none"),
    "train.span_logprob": ("sum", "mean"),
    "train.normalize": ("none", "span", "byte", "start"),
    "annotate.devices": ("host", "all"),
    "annotate.teacher_weights": ("float32", "bfloat16", "int8"),
    "propose.contrast": ("weights", "start"),
    "export.dtype": ("float32", "bfloat16", "float16"),
}
POSITIVE = (lambda x: 0 < x < math.inf, "it has to be positive and finite")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "it cannot be negative, and has to be finite")
SHARE = (lambda x: 0 <= x <= 1, "it is a share, from 0 to 1")
DTYPE = (lambda x: x in ("float32", "bfloat16"), "choose one of float32, bfloat16")
# What every stage that trains has, and those with a `beta` besides: settings, what has to hold, and else what is said.
OF_STAGES: tuple[tuple[str, Range], ...] = (
    ("lr epochs batch_size micro_batch clip save_every lora.alpha", POSITIVE),
    ("weight_decay save_minutes", NOT_NEGATIVE),
    ("warmup", (SHARE[0], "it is a share of the steps, from 0 to 1")),
    ("moments", DTYPE),
    ("lora.base", (lambda x: x in ("float32", "bfloat16", "int8"), "choose one of float32, bfloat16, int8")),
    ("nonfinite", (lambda x: x in ("stop", "skip"), "choose one of stop, skip")),
    ("adam_b1 adam_b2", (lambda x: 0 <= x < 1, "it lies in [0, 1)")),
    ("lora.rank", (lambda x: x >= 0, "it cannot be negative; 0 trains all parameters")),
    ("steps", (lambda x: x >= -1, "0 means as many as the epochs give, -1 leaves the stage out")),
)
OF_PREFERENCES: tuple[tuple[str, Range], ...] = (
    ("beta", POSITIVE),
    ("label_smoothing", (lambda x: 0 <= x < 0.5, "it lies in [0, 0.5)")),
    ("sft_weight eval_every patience", NOT_NEGATIVE),
    ("eval_pairs", POSITIVE),
)
OF_OTHERS: tuple[tuple[str, Range], ...] = (
    ("data.max_prompt_tokens data.max_response_tokens rows.multiple log_every", POSITIVE),
    ("annotate.micro_batch annotate.pairs_per_shard annotate.parallel evaluate.max_new_tokens weights.k", POSITIVE),
    ("data.limit data.test_limit rows.buckets rows.length annotate.compared_pairs stall_minutes", NOT_NEGATIVE),
    ("evaluate.samples evaluate.temperature train.regression train.offset", NOT_NEGATIVE),
    ("train.target_clip", POSITIVE),
    ("train.tau train.trust", NOT_NEGATIVE),
    ("propose.pairs propose.temperature propose.batch", POSITIVE),
    ("propose.limit propose.min_contrast", NOT_NEGATIVE),
    ("propose.answers", (lambda x: x >= 2, "one answer has nothing to be ranked against")),
    ("data.min_kept models_in_memory", SHARE),
    ("evaluate.length_tolerance", (lambda x: 0 <= x < 1, "it lies in [0, 1)")),
    ("weights.top_share", (lambda x: 0 < x <= 1, "it lies in (0, 1]")),
    ("weights.mu weights.lower weights.upper", (math.isfinite, "it has to be finite; 1e9 as a bound switches it off")),
)


def check_config(config: ConfigDict) -> None:
    """Refuses, by name and before anything long has run, what cannot be.

    Raises:
      UserError: a value that is no choice, a number out of its range, or a combination that means nothing.
    """
    # From what is missing to what does not go together: each check may trust those before it.
    _check_keys(config)
    for name, choices in CHOICES.items():
        _require(config, attrgetter(name)(config) in choices, name, f"choose one of {', '.join(choices)}")
    _require_ranges(config, OF_OTHERS)
    for stage in TRAINED:
        _check_stage(config, stage)
    named = re.fullmatch(r"(\w+)=\d+:\d+", config.profile)
    whose = "write STAGE=FIRST:LAST, a stage that trains and its updates, such as train=5:8"
    _require(config, not config.profile or (named is not None and named[1] in TRAINED), "profile", whose)
    _check_weights(config)
    _check_objective(config)
    _check_elsewhere(config)
    _check_int8(config)

    # The student of the proposals is trained as `train` is: what has to hold there has to hold of its settings.
    proposed = config.student_proposed
    if proposed.steps != -1:
        ranks = config.weights.source not in ("uniform", "random")
        _require(config, ranks, "weights.source", "proposals are ranked by the contrast of two models")
        instead = ConfigDict(config.to_dict() | {"train": proposed.to_dict()})
        instead.student_proposed.steps = -1
        try:
            check_config(instead)
        except UserError as error:
            raise UserError(str(error).replace("config.train.", "config.student_proposed.")) from None


def _require(config: ConfigDict, holds: bool, name: str, what: str) -> None:
    if not holds:
        raise UserError(f"config.{name} is {attrgetter(name)(config)!r}; {what}.")


def _require_ranges(config: ConfigDict, ranges: tuple[tuple[str, Range], ...], prefix: str = "") -> None:
    for names, (holds, what) in ranges:
        for name in names.split():
            _require(config, holds(attrgetter(prefix + name)(config)), prefix + name, what)


def _check_keys(config: ConfigDict) -> None:
    # A config that does not begin with the defaults would fail much later.
    expected = default_config()
    sections = {name: part for name, part in expected.items() if isinstance(part, ConfigDict)}
    for section, keys in {"": expected, **sections}.items():
        missing = [key for key in keys if key not in (config if not section else config.get(section, {}))]
        if missing:
            name = f"{section}.{missing[0]}" if section else missing[0]
            raise UserError(f"config.{name} is missing; begin get_config() with ctpd_jax.settings.default_config().")
    if not config.data.train:
        raise UserError("config.data.train is empty; give FILE.jsonl, tfds:NAME or hf:NAME.")


def _check_stage(config: ConfigDict, stage: str) -> None:
    """Checks the settings of one stage that trains."""
    settings, require = config[stage], partial(_require, config)
    _require_ranges(config, OF_STAGES, f"{stage}.")
    # One update has to move a bfloat16 by more than it is rounded.
    coarse = settings.moments == "bfloat16" and settings.adam_b1 > 0.98
    require(not coarse, f"{stage}.adam_b1", "with moments in bfloat16 it can be 0.98 at most")
    frozen = settings.lora.rank > 0 or settings.lora.base == "float32"
    require(frozen, f"{stage}.lora.base", f"without adapters ({stage}.lora.rank 0) parameters train in float32")
    if "beta" in settings:
        _require_ranges(config, OF_PREFERENCES, f"{stage}.")
        best = settings.keep_best
        require(best in ("", *MEASURES), f"{stage}.keep_best", f"choose one of {', '.join(MEASURES)}")
        require(settings.eval_every or not best, f"{stage}.eval_every", "the best update is that of a look: set it")
        require(best or not settings.patience, f"{stage}.keep_best", "patience waits for a better look: say of what")
        require(config.data.test or not settings.eval_every, "data.test", f"{stage}.eval_every looks at held-out pairs")
    # Distillation: whose distributions, and how they are kept.
    if "teacher" in settings:
        require(settings.teacher in TEACHERS, f"{stage}.teacher", f"choose one of {', '.join(TEACHERS)}")
        weights = config.weights
        dpo = "positive" in CONTRASTIVE.get(weights.source, ()) and weights.positive_scorer == "teacher"
        lacking = settings.teacher == "positive" and settings.steps != -1 and not dpo
        require(not lacking, f"{stage}.teacher", "this config's weights train no such teacher")
        numbers = " ".join(name for name in ("top_k", "temperature", "projector_lr") if name in settings)
        _require_ranges(config, ((numbers, POSITIVE), ("ce_weight weight", NOT_NEGATIVE)), f"{stage}.")


def _check_weights(config: ConfigDict) -> None:
    """Checks what the weights of spans need, and the students that are trained with weights of their own."""
    weights, train, require = config.weights, config.train, partial(_require, config)
    require(weights.lower < weights.upper, "weights.lower", "it has to lie below weights.upper")
    for stage in CONTRASTIVE.get(weights.source, ()):
        require(config[stage].steps >= 0, f"{stage}.steps", f"weights.source {weights.source!r} needs that stage")
    for stage in ("student_dpo", "student_reverse") if config.student_tis.steps != -1 else ():
        require(config[stage].steps >= 0, f"{stage}.steps", "student_tis takes its weights from that stage")
    ranked = weights.source == "uniform" and weights.transform != "none"
    require(not ranked, "weights.transform", "uniform weights have nothing to transform, set it to none")
    own = train.lora.rank and train.steps != -1 and config.student_sft.steps == -1
    if config.export.adapters and not own:
        raise UserError(
            "config.export.adapters needs a student trained with adapters (config.train.lora.rank) on your own "
            "checkpoint (config.student_sft.steps=-1): adapters belong to the model that they were trained on."
        )


def _check_objective(config: ConfigDict) -> None:
    """Checks what train.objective needs of the other settings."""
    weights, train, require = config.weights, config.train, partial(_require, config)
    # 1. A teacher that has learnt.
    taught = weights.source not in ("uniform", "random")
    what = f"train.objective {train.objective!r} follows a teacher that has learnt"
    require(taught or train.objective == "ctpd", "weights.source", what)
    reversed_too = train.contrast == "start" or weights.source != "dpo_reference"
    require(reversed_too, "train.contrast", "weights.source 'dpo_reference' trains no negative")

    # 2. The margin of a pair.
    plain = train.loss == "sigmoid" and not train.label_smoothing
    labelled = train.margin_as == "label"
    require(plain or not labelled, "train.loss", "train.margin_as 'label' is for sigmoid without label smoothing")
    unread = train.objective == "regression" and train.margin_as in ("label", "offset")
    require(not unread, "train.margin_as", "train.objective 'regression' reads no label, set it to none or weight")
    require(train.margin_as == "offset" or train.trust <= 1, "train.trust", "it is a share here, from 0 to 1")

    # 3. The reference.
    if train.normalize == "start" and train.reference == "none":
        raise UserError(
            "config.train.normalize 'start' measures against the student's start, so config.train.reference "
            "cannot be 'none'."
        )


def _check_elsewhere(config: ConfigDict) -> None:
    """Checks what a teacher that is elsewhere needs, and cannot do."""
    annotate, require = config.annotate, partial(_require, config)
    if "teacher" in models_here(config):
        return
    require(
        not (annotate.table and annotate.endpoint), "annotate.table", "annotate.endpoint measures the same: set one"
    )
    if annotate.endpoint:
        address = annotate.endpoint.startswith(("http://", "https://"))
        require(address, "annotate.endpoint", "the address of a server begins with http:// or https://")
        for name, column in columns(config).items():
            named = column.outside != "endpoint: "
            require(named, f"annotate.served.{name}", "name the model on the server that annotate.endpoint names")
    # What nobody elsewhere can know, or tell.
    ranked = config.student_proposed.steps == -1 or annotate.endpoint
    require(ranked, "annotate.table", "nobody has measured yet what the student will answer: student_proposed.steps=-1")
    for stage in (name for name, stage in STAGES.items() if stage.kind == "distill"):
        why = "it learns from all probabilities of a teacher, whose weights have to be here"
        require(config[stage].steps == -1, f"{stage}.steps", why)


def _check_int8(config: ConfigDict) -> None:
    """Refuses what would hold an int8 model against another one: its rounding would be taken for a preference."""
    require, whole = partial(_require, config), config.annotate.teacher_weights
    for stage in (name for name in TRAINED if not left_out(config, name)):
        model, base = trained_model(config, stage), config[stage].lora.base
        sft = f"{model}_sft"
        if stage in CONTRASTIVE.get(config.weights.source, ()):
            reads = {
                "teacher": f"annotate.teacher_weights={whole!r}; int8 has to be both, or neither",
                "student": "float32; int8 is the teacher's alone",
            }
            same = (base == "int8") == (reading_dtype(config, model) == "int8")
            require(same, f"{stage}.lora.base", f"the {model} reads in {reads[model]}")
        # Whole parameters that SFT has trained are never rounded: adapters stay beside.
        rounds = base == "int8" or (model == "teacher" and whole == "int8")
        adapted = left_out(config, sft) or config[sft].lora.rank > 0
        require(adapted or not rounds, f"{sft}.lora.rank", "only adapters can lie over the int8 base of later stages")
    # A student's positive may be measured against the student's start, which lies over the base that `train` has.
    own = "positive" in CONTRASTIVE.get(config.weights.source, ()) and config.weights.positive_scorer == "student"
    contrasts = (config.train.objective != "ctpd" and config.train.contrast, config.propose.contrast)
    against = config.weights.source == "dpo_reference" or "start" in contrasts
    what = "the student's contrastive pair reads in float32, and so has its start to"
    require(not (own and against) or base_dtype(config, "train") != "int8", "train.lora.base", what)
