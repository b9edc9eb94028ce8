"""The command line: parse, open the job, carry its stages out, exit.

Exit codes: 0 done, 2 the user can mend it (one sentence on stderr), 3 `ctpd plan` found that something does not fit, 75
stopped by SIGTERM with everything saved (give the same command again), 130 interrupted; anything else is a bug of ours.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ctpd_jax.errors import UserError, lacking, without_secrets
from ctpd_jax.job.arguments import LOOKING, parser
from ctpd_jax.job.check import check_config
from ctpd_jax.job.table import STAGES, why_left_out
from ctpd_jax.processes import messages, preempt
from ctpd_jax.processes.loops import last_line, let_go
from ctpd_jax.settings import default_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries out one command, its stages in their order, and returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character of some text ends no run
        sys.stdout.reconfigure(errors="replace")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, which is not needed
    known, overrides = parser().parse_known_args(arguments)
    try:
        # From here on everything that is said is logged too, if that is asked for.
        with messages.heard(getattr(known, "log", None), getattr(known, "quiet", False)):
            return carried_out(known, overrides)
    except UserError as error:
        print(f"ctpd {known.command}: {error}", file=sys.stderr)
        return 2


def carried_out(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Carries out a command and returns the exit code; whatever ends it is told in a sentence, but for our own bugs."""
    try:
        # These have nothing that could go on: SIGTERM ends them at once.
        if known.command in LOOKING or asks_harness(known):
            return look(known, overrides)
        with preempt.listening():
            from ctpd_jax.buckets import twin

            # 1. What is asked for. JAX reads its environment when it is imported: until here it is not.
            config = load_config(known.config, overrides)
            check_config(config)
            choose_platform(config)
            from ctpd_jax.job.job import open_job, told
            from ctpd_jax.job.preflight import preflight
            from ctpd_jax.job.status import is_news, what_is_there
            from ctpd_jax.processes import distributed
            from ctpd_jax.report.page import write_report
            from ctpd_jax.sharding import first_process

            # 2. All of the code: a long run must not meet a file that was changed or is missing meanwhile.
            stages = {name: import_module(f"ctpd_jax.stages.{STAGES[name].kind}") for name in chosen_stages(known)}

            # 3. Each stage that is not left out knows whether it is finished or goes on.
            with (
                distributed.joined(),
                twin.local(known.workdir) as workdir,
                open_job(config, workdir, messages.say) as job,
            ):
                preflight(job, known.command)
                job.note("config.json", told(config))
                for name, module in stages.items():
                    with preempt.during(name):
                        if why := why_left_out(config, name):
                            job.say(f"{name}: left out ({why}).")
                        else:
                            module.run(job, name)
                    # Evaluation writes the page itself, the export adds nothing to it.
                    if first_process() and name not in ("evaluate", "export") and is_news(job.workdir, name):
                        write_report(job.workdir)
                if known.command == "export" and known.push and first_process():
                    stages["export"].push(job.workdir / "export", known.push, known.private, known.dry_run, job.say)
                if first_process():
                    print(what_is_there(job.workdir))
    except UserError as error:
        messages.fail(f"ctpd {known.command}: {error}")
        return 2
    except (IsADirectoryError, NotADirectoryError) as error:
        what = "a folder where a file belongs" if isinstance(error, IsADirectoryError) else "not a folder"
        place = error.filename2 or error.filename
        print(f"ctpd {known.command}: {place} is {what}; remove it and give the command again.", file=sys.stderr)
        return 2
    except preempt.Preempted as stop:
        messages.fail(f"ctpd {known.command}: stopped {stop}. The same command goes on from there.")
        return preempt.EXIT_CODE
    except KeyboardInterrupt as stop:
        last_line()
        let_go(stop)
        messages.fail(f"\nctpd {known.command}: interrupted; the same command goes on from the last checkpoint")
        return 130
    except Exception as error:
        if (sentence := lacking(error, getattr(known, "workdir", None))) is None:
            raise
        last_line()  # other files of a save that failed would tell the same
        messages.fail(f"ctpd {known.command}: {without_secrets(sentence)}")
        return 2
    return 0


def chosen_stages(known: argparse.Namespace) -> list[str]:
    """The stages that a command runs."""
    if known.command == "run":
        return list(STAGES)
    if known.command == "sft":
        return [f"{known.model}_sft"] if known.model else ["teacher_sft", "student_sft"]
    if known.command == "dpo":
        both = ("student_dpo", "student_reverse") if known.student else ("positive", "negative")
        return [both[known.reverse]]
    if known.command == "train":
        return ["student_proposed" if known.proposed else "train"]
    return [known.command]


def look(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The commands that only look. Returns the exit code."""
    # 1. Those that need no run.
    from ctpd_jax.buckets import twin

    if known.command in ("report", "status"):
        with twin.local(known.workdir, looks_only=True, small=True) as workdir:
            return looked_at(known.command, workdir)
    if known.command == "plan":
        return planned(known, overrides)
    if known.command == "judge":
        from ctpd_jax.stages.judge import judge

        judge(known)
        return 0
    if known.command == "generate" and answered_from_folder(known, overrides):
        return 0
    if known.command == "inspect" and inspected_data(known, overrides):
        return 0
    # 2. Those that look at a run.
    config = load_config(known.config, overrides)
    if known.command == "evaluate" and known.folder:
        config.data.train = "none.jsonl"  # no data are read
    check_config(config)
    choose_platform(config)
    from ctpd_jax.job.job import open_job
    from ctpd_jax.processes import distributed
    from ctpd_jax.stages import generate, harness, inspect, table

    # The answers of `generate` may go into a file, where nothing else belongs.
    say = partial(print, file=sys.stderr) if known.command == "generate" else print
    with (
        distributed.joined(),
        twin.local(known.workdir, looks_only=known.command != "evaluate") as workdir,  # lm-eval's answers are kept
        open_job(config, workdir, say, looks_only=True) as job,
    ):
        if known.command == "inspect":
            inspect.inspect(job, known)
        elif known.command == "evaluate":
            harness.run(job, known)
        elif known.command == "table":
            table.write_table(job, known.out)
        else:
            generate.answer(job, known)
    return 0


def asks_harness(known: argparse.Namespace) -> bool:
    """Whether lm-eval is to ask the questions.

    Raises:
      UserError: what belongs to it without it, or neither a run nor a folder.
    """
    if known.command != "evaluate":
        return False
    names = ("folder", "model", "limit", "harness_tasks", "chat_template", "log_samples")
    if known.harness is None and any(getattr(known, name) for name in names):
        raise UserError("--folder, --model, --limit and what else lm-eval is told belong to --harness.")
    if (known.config is None) != (known.folder is not None):
        raise UserError("give --config of a run, or --harness and --folder with a model in Hugging Face format.")
    return known.harness is not None


def planned(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Plans the stages; the exit code says whether they fit."""
    config = load_config(known.config, overrides)
    config.data.train = config.data.train or "none.jsonl"  # no data are read
    check_config(config)
    from ctpd_jax.plan import chips

    chips.quiet_compiler()
    from ctpd_jax.plan.command import plan_command

    return plan_command(known, config)


def looked_at(command: str, workdir: Path) -> int:
    """Says how far a run has come, or writes its page as far as it has.

    Raises:
      UserError: there is no run.
    """
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run: there is no config.json.")
    if command == "status":
        from ctpd_jax.job.status import status

        print(status(workdir))
    else:
        from ctpd_jax.report.page import write_report

        print(write_report(workdir))
    return 0


def choose_platform(config: ConfigDict) -> None:
    """JAX reads its environment when it is imported, which only comes after this."""
    if config.platform != "auto":
        os.environ["JAX_PLATFORMS"] = config.platform


def load_config(path: str | None, overrides: Sequence[str]) -> ConfigDict:
    """Reads a config file, or takes the defaults, and applies --config.key=value.

    Raises:
      UserError: no such file, no get_config in it, an unknown key, a value of the wrong type.
    """
    # Flags of our own, so that nothing of absl's is read from the command line.
    values = flags.FlagValues()
    line = ["ctpd", *([f"--config={path}"] if path else []), *overrides]
    options: dict[str, Any] = {"lock_config": True, "flag_values": values, "sys_argv": line}
    if path is None:
        config_flags.DEFINE_config_dict("config", default_config(), **options)
    elif Path(path.partition(":")[0]).is_file():  # what stands behind a colon is for the file's get_config
        config_flags.DEFINE_config_file("config", **options)
    else:
        raise UserError(f"There is no config file {path}.")
    path = path or "--config"
    try:
        left = values(line)
        if left[1:]:
            raise UserError(f"What does {left[1]!r} mean? Settings are written --config.key=value.")
        return values["config"].value
    except (AttributeError, KeyError) as error:
        raise UserError(f"{path}: {str(error).strip(chr(34))} All keys stand in ctpd_jax/settings.py.") from error
    except Exception as error:  # a config file is code: whatever it raises is told, not traced
        first: BaseException = error  # config_flags wraps it in a text with a traceback, and absl once more
        while before := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
            first = before
        if isinstance(first, UserError):
            raise first from None
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error


def inspected_data(known: argparse.Namespace, overrides: Sequence[str]) -> bool:
    """Shows what becomes of a data set's rows where one was given.

    Raises:
      UserError: neither a data set nor a run, or one tokenizer without the other.
    """
    if known.data is None:
        if not known.config or not known.workdir:
            raise UserError("give --config and --workdir of a run, or --data with a data set.")
        return False
    # Tokenizers of the command line, or those of the config; without any, rows alone are looked at.
    config = load_config(known.config, overrides)
    config.data.train = known.data
    check_config(config)
    paths = [getattr(known, model) or config[model].path for model in ("teacher", "student")]
    shown = known.pair or known.stats or known.html
    if shown and not any(paths):
        raise UserError("give --teacher and --student: there are no spans without two tokenizers.")
    if any(paths) and not all(paths):
        raise UserError("give both --teacher and --student, or neither: pairs are cut where both tokenizers agree.")
    from ctpd_jax.text.columns import Reading
    from ctpd_jax.text.overview import overview
    from ctpd_jax.text.prepare import Limits

    settings = [config[model] for model in ("teacher", "student")]
    models = [(path, each.template, each.template_variables) for path, each in zip(paths, settings) if path]
    limit, reading, limits = config.data.limit or None, Reading.of(config.data), Limits.of(config.data)
    pairs, raw, texts = overview(known.data, known.split, limit, reading, limits, models, print)
    if shown:
        from ctpd_jax.stages.inspect import show

        show(known, config, pairs, raw, dict(zip(("teacher", "student"), texts)), print)
    return True


def answered_from_folder(known: argparse.Namespace, overrides: Sequence[str]) -> bool:
    """Answers with a model folder where one was given.

    Raises:
      UserError: neither a folder nor a run, or both.
    """
    if known.folder is None:
        if not known.config or not known.workdir:
            raise UserError("give --config and --workdir of a run, or --folder with a model in Hugging Face format.")
        return False
    if known.config or known.workdir or overrides:
        superfluous = "--config" if known.config else "--workdir" if known.workdir else overrides[0]
        raise UserError(f"--folder answers with that model alone: leave {superfluous} out, or leave --folder out.")
    from ctpd_jax.stages.generate import answer_from_folder

    answer_from_folder(known)
    return True


if __name__ == "__main__":
    sys.exit(main())
