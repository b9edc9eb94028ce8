"""The stages in their order, and what each command of the command line does."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ctpd_jax import assess, distributed, preempt, stages
from ctpd_jax.data.loader import steps_per_epoch
from ctpd_jax.errors import UserError
from ctpd_jax.files import write_json
from ctpd_jax.models.hf.load import check_weights
from ctpd_jax.run import MODELS, Run, check_platform, check_sizes
from ctpd_jax.settings import TRAINED
from ctpd_jax.sharding import first_process
from ctpd_jax.train.metrics import MetricLog

# In order. Each one knows by itself whether it is finished, has to go on, or is left out.
STAGES: dict[str, Callable[[Run], None]] = {
    "teacher_sft": lambda run: stages.sft(run, "teacher_sft"),
    "student_sft": lambda run: stages.sft(run, "student_sft"),
    "positive": lambda run: stages.contrast(run, "positive"),
    "negative": lambda run: stages.contrast(run, "negative"),
    "annotate": stages.annotate,
    "student_dpo": lambda run: stages.contrast(run, "student_dpo"),
    "train": stages.train_student,
    "evaluate": assess.evaluate,
    "export": assess.export,
}


@distributed.joined()
def command(arguments: argparse.Namespace, config: ConfigDict) -> None:
    """Carries out one command. Raises UserError for what the user can mend."""
    check_platform(config)
    distributed.check_joined()
    workdir = Path(arguments.workdir).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be made: {error.strerror}.") from error
    if config.compile_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX's own setting goes first
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    with MetricLog(workdir, active=first_process()) as log:
        # The answers of `generate` may go into a file, where nothing else belongs.
        say = partial(print, file=sys.stderr) if arguments.command == "generate" else print
        run = Run(config, workdir, log, say if first_process() else lambda text: None)
        run.say(f"JAX {jax.__version__} on {', '.join(str(device) for device in jax.devices())}; {workdir}")
        if run.mesh.devices.size > 1:
            run.say("mesh: " + ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items()))
        if arguments.command == "inspect":
            assess.inspect(run, arguments.pair)
        elif arguments.command == "generate":
            assess.answer(run, arguments.model, arguments.prompt, assess.sampling_of(arguments, config.seed))
        else:
            if arguments.command in ("run", "sft", "dpo", "annotate"):
                in_turn(lambda: check_sizes(run), "models")
                for model in MODELS:
                    run.compute(model)  # refuses an attention back end that cannot do what the model asks
            if arguments.command == "run":
                in_turn(lambda: preflight(run), "data")
            elif jax.process_count() > 1 and arguments.command != "train":
                in_turn(lambda: run.pairs("train"), "data")
            if first_process():
                write_json(workdir / "config.json", config.to_dict())
            for stage in chosen_stages(arguments):
                carry_out(run, stage)


def in_turn(prepare: Callable[[], object], name: str) -> None:
    """The first process prepares what all of them need; then the others do, and find on disk what it has made."""
    with preempt.apart(f"{name}: prepared once"):
        if first_process():
            prepare()
    with preempt.apart(f"{name}: prepared"):
        if not first_process():
            prepare()


def carry_out(run: Run, stage: str) -> None:
    """One stage. Raises Preempted, with its name, where the run was asked to stop before it or in it."""
    where = f"before {stage}"
    try:
        if preempt.stop_now():
            raise preempt.Preempted("what comes before it is finished")
        where = f"in {stage}"
        STAGES[stage](run)
    except preempt.Preempted as stop:
        stop.where = where
        raise


def preflight(run: Run) -> None:
    """Meets now what a late stage would meet after hours: broken weights, a missing test set, too few pairs."""
    for model in MODELS:
        preempt.check("the models are checked anew")
        run.weights_digest(model)
        check_weights(run.folder(model), run.decoder(model))
    for split in ("train", "test"):
        run.pairs(split)
    for stage in TRAINED:
        if not run.left_out(stage):
            steps_per_epoch(len(run.pairs("train")), run.config[stage].batch_size)
            stages.check_trainable(run, stage)


def chosen_stages(arguments: argparse.Namespace) -> list[str]:
    """The stages that a command runs."""
    if arguments.command == "run":
        return list(STAGES)
    if arguments.command == "sft":
        return [f"{arguments.model}_sft"] if arguments.model else ["teacher_sft", "student_sft"]
    if arguments.command == "dpo":
        return ["student_dpo" if arguments.student else "negative" if arguments.reverse else "positive"]
    return [arguments.command]
