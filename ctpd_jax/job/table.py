"""What the stages are. A new stage is one entry here and one file in stages/, with `run(job, stage)` in it.

One that trains also has a section of its name in settings.py. `run` is called where the stage is not left out.

Nothing heavy is imported: the command line reads this table before JAX is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ml_collections import ConfigDict

from ctpd_jax.schema import MODELS, Model


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str  # also its folder in the workdir and, where it trains, its section of the config
    kind: str  # the file of stages/ that carries it out
    command: str  # what runs it alone
    says: str  # what it makes, in words; {model} for the one that the config names
    model: Model | None = None  # whose parameters it trains; None: config.weights names it, or nothing is trained
    starts_from: str = "{model}_sft"  # the stage whose model it begins with; "": the user's checkpoint
    row: str = ""  # its model in the table of the evaluation

    @property
    def trains(self) -> bool:
        return self.kind in ("sft", "dpo", "train", "tis", "distill")


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "teacher_sft", "sft", "ctpd sft --model teacher", "teacher, SFT on the chosen responses",
            model="teacher", starts_from="", row="teacher",
        ),
        Stage(
            "student_sft", "sft", "ctpd sft --model student", "student, SFT on the chosen responses",
            model="student", starts_from="", row="student_start",
        ),
        Stage(
            "positive", "dpo", "ctpd dpo", "{model}, leaning to the chosen responses",
            row="teacher_dpo",
        ),
        Stage(
            "negative", "dpo", "ctpd dpo --reverse", "{model}, leaning to the rejected responses",
        ),
        Stage(
            "annotate", "annotate", "ctpd annotate",
            "span log-probabilities of reference, contrastive pair and start -> DIR/annotations",
        ),
        Stage(
            "propose", "propose", "ctpd propose",
            "the student answers the prompts, the teacher ranks its answers -> pairs and their store in DIR/proposals",
        ),
        Stage(
            "student_dpo", "dpo", "ctpd dpo --student", "student, plain DPO, for comparison",
            model="student", row="student_dpo",
        ),
        Stage(
            "student_reverse", "dpo", "ctpd dpo --student --reverse", "student, leaning to the rejected responses",
            model="student",
        ),
        Stage(
            "student_tis", "tis", "ctpd student_tis", "student, TIS-DPO with a contrastive pair of its own",
            model="student", row="student_tis",
        ),
        Stage(
            "student_uld", "distill", "ctpd student_uld", "student, ULD of the teacher's sorted probabilities",
            model="student", row="student_uld",
        ),
        Stage(
            "student_ot", "distill", "ctpd student_ot", "student, Multi-Level OT of the teacher's sorted probabilities",
            model="student", row="student_ot",
        ),
        Stage(
            "student_dskd", "distill", "ctpd student_dskd", "student, DSKD of the teacher's hidden states",
            model="student", row="student_dskd",
        ),
        Stage(
            "train", "train", "ctpd train", "student, CTPD on the annotated data",
            model="student", row="ctpd",
        ),
        Stage(
            "student_proposed", "train", "ctpd train --proposed",
            "student, CTPD on its own answers as the teacher ranks them",
            model="student", row="ctpd_proposed",
        ),
        Stage(
            "evaluate", "evaluate", "ctpd evaluate",
            "accuracies, lambda, sampled answers -> DIR/evaluation.json, DIR/report.html",
        ),
        Stage("export", "export", "ctpd export", "the trained student in Hugging Face format -> DIR/export"),
    )
}  # fmt: skip
TRAINED = tuple(name for name, stage in STAGES.items() if stage.trains)
# The stages that train the pair whose log-ratio the weights are.
CONTRASTIVE = {"dpo": ("positive", "negative"), "sft": ("positive", "negative"), "dpo_reference": ("positive",)}
REVERSED = ("negative", "student_reverse")  # what learns pairs with the sides swapped
# What runs programs of its own, and is planned: distillation is not, its programs depend on the teacher's tokens too.
PLANNED = (*(name for name in TRAINED if STAGES[name].kind != "distill"), "annotate")
DISTILLED = ("ctpd", "ctpd_proposed")  # rows of the students that CTPD made; the first that is there is exported
# Students that are made of the same start: they stand beside each other, and no other one needs them.
STUDENTS = tuple(name for name in TRAINED if STAGES[name].model == "student" and STAGES[name].starts_from)


# ------------------------------------------------------------------------------------------------ asked of a config


def trained_model(config: ConfigDict, stage: str) -> Model:
    """Whose parameters a stage trains."""
    return STAGES[stage].model or config.weights[f"{stage}_scorer"]


def models_here(config: ConfigDict) -> tuple[Model, ...]:
    """The models that are run here; of a teacher that is elsewhere only the tokenizer is."""
    return ("student",) if config.annotate.endpoint or config.annotate.table else MODELS


def starts_from(config: ConfigDict, stage: str) -> str:
    """The stage whose model a training stage begins with; "" for the checkpoint that the user brought."""
    return STAGES[stage].starts_from.format(model=trained_model(config, stage))


def why_left_out(config: ConfigDict, stage: str) -> str:
    """What leaves a stage out, "" where nothing does; only those that train, and proposals that nobody learns from."""
    if stage == "propose":
        return why_left_out(config, "student_proposed")
    if not STAGES[stage].trains:
        return ""
    if config[stage].steps == -1:
        return f"config.{stage}.steps = -1; 0 is an epoch"
    # The user's word goes first; then what cannot be trained here.
    if trained_model(config, stage) not in models_here(config):
        return f"config.annotate.{'endpoint' if config.annotate.endpoint else 'table'}: the teacher is elsewhere"
    unused = stage in ("positive", "negative") and stage not in CONTRASTIVE.get(config.weights.source, ())
    return "weights.source needs none" if unused else ""


def left_out(config: ConfigDict, stage: str) -> bool:
    return bool(why_left_out(config, stage))


def is_sft(config: ConfigDict, stage: str) -> bool:
    """Whether a stage learns single responses rather than pairs."""
    return STAGES[stage].kind in ("sft", "distill") or (
        stage in ("positive", "negative") and config.weights.source == "sft"
    )


def base_dtype(config: ConfigDict, stage: str) -> str:
    """In which dtype a stage holds what it starts from: what is trained whole is float32."""
    return config[stage].lora.base if config[stage].lora.rank else "float32"


def reading_dtype(config: ConfigDict, model: Model) -> str:
    """In which dtype a model's parameters are held where it only reads or answers."""
    return config.annotate.teacher_weights if model == "teacher" else "float32"


def fingerprint(config: ConfigDict, stage: str) -> dict[str, Any]:
    """The settings of a stage that decide its numbers beyond rounding; its updates are counted in `steps`."""
    settings = config[stage].to_dict()
    if not settings["lora"]["rank"]:
        settings["lora"] = {"rank": 0}
    # A stage that an update without a number has ended may go on without that update.
    without = {"save_every", "save_minutes", "micro_batch", "epochs", "nonfinite"}
    if not settings.get("keep_best"):  # then looking changes nothing
        without |= {"eval_every", "eval_pairs", "keep_best", "patience"}
    return {name: value for name, value in settings.items() if name not in without}


def profiled(config: ConfigDict, stage: str) -> range:
    """The updates of a stage that config.profile names, as "train=5:8" names 5, 6 and 7."""
    name, _, updates = config.profile.partition("=")
    return range(*map(int, updates.split(":"))) if name == stage else range(0)


@dataclass(frozen=True)
class Column:
    """What annotation measures under one name."""

    stage: str  # whose model reads
    model: Model  # on whose tokens
    dtype: str  # of its parameters
    instruction: str | None = None  # put before the prompt
    outside: str = ""  # who measures it elsewhere: "table", or "endpoint: " and its model's name there


def columns(config: ConfigDict) -> dict[str, Column]:
    """The columns of the annotations: the reference, the student's start, and the contrastive pair."""
    return {name: _where(config, name, column) for name, column in _columns(config).items()}


def _where(config: ConfigDict, name: str, column: Column) -> Column:
    """The column, with whoever measures it elsewhere."""
    if column.model in models_here(config):
        return column
    # Instructions are all that tells a pair apart that one model makes.
    served = config.annotate.served["reference" if column.instruction is not None else name]
    return replace(column, dtype="", outside=f"endpoint: {served}" if config.annotate.endpoint else "table")


def _columns(config: ConfigDict) -> dict[str, Column]:
    # Two models that every weighing needs, and the pair whose log-ratio it is.
    weights = config.weights
    found = {
        "reference": Column("teacher_sft", "teacher", reading_dtype(config, "teacher")),
        # The start is what training begins with: its adapters' base has the dtype that it has there.
        "start": Column("student_sft", "student", base_dtype(config, "train")),
    }
    for name, instruction in (("positive", weights.good_prompt), ("negative", weights.bad_prompt)):
        model = weights[f"{name}_scorer"]
        if name in CONTRASTIVE.get(weights.source, ()):
            found[name] = Column(name, model, reading_dtype(config, model))
        elif weights.source == "prompts":
            stage = f"{model}_sft"
            start = found["start"].dtype if model == "student" else reading_dtype(config, model)
            found[name] = Column(stage, model, start, instruction)
    return found


def rows(config: ConfigDict) -> dict[str, str]:
    """The models of the evaluation's table, the student's first: row -> the stage that left it.

    Starts are there also where their stage is left out. Of the contrastive pair only a teacher's DPO is a model that
    somebody would use.
    """
    # The stages in their order; then the student's before the teacher's.
    table: dict[str, str] = {}
    for stage in STAGES.values():
        if not stage.row:
            continue
        model = trained_model(config, stage.name)
        if model not in models_here(config):
            continue
        start = stage.starts_from == ""
        dpo_teacher = config.weights.source in ("dpo", "dpo_reference") and model == "teacher"
        if start or (not left_out(config, stage.name) and (stage.name != "positive" or dpo_teacher)):
            table[stage.row] = stage.name
    return dict(sorted(table.items(), key=lambda entry: trained_model(config, entry[1]) != "student"))


def row_starts(config: ConfigDict) -> dict[str, str]:
    """The rows that were trained from another one: row -> the row of its start."""
    table = rows(config)
    own = {stage: row for row, stage in table.items()}
    starts = {row: starts_from(config, stage) for row, stage in table.items()}
    return {row: own[start] for row, start in starts.items() if start}


def way_to(config: ConfigDict, row: str) -> dict[str, str]:
    """What the training stages on the way to a student of the table make, in words."""
    others = set(STUDENTS) - {rows(config)[row]}
    way = [name for name in TRAINED if name not in others] if row in DISTILLED else ["student_sft"]
    return {name: STAGES[name].says.format(model=trained_model(config, name)) for name in way}
