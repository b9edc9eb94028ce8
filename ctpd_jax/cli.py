"""The command line: parse, call, exit. What each command does stands in pipeline.py.

Exit codes: 0 done, 2 the user can mend it (one sentence on stderr), 3 `ctpd plan` found that something does not fit, 75
stopped by SIGTERM with everything saved (give the same command again), 130 interrupted; anything else is a bug of ours.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ctpd_jax import preempt
from ctpd_jax.errors import UserError
from ctpd_jax.settings import TRAINED, check_config, default_config

COMMANDS = {
    "run": "every stage in order; picks up where it stopped",
    "sft": "supervised fine-tuning of teacher and student",
    "dpo": "the contrastive pair: DPO, and with --reverse the pair swapped; --student: the plain DPO student",
    "annotate": "span log-probabilities of reference, contrastive pair and start -> DIR/annotations",
    "train": "CTPD of the student on the annotated data",
    "evaluate": "preference accuracies, lambda, sampled answers -> DIR/evaluation.json, DIR/report.html",
    "export": "the trained student in Hugging Face format -> DIR/export",
    "plan": "whether the stages fit a slice of TPUs, and how fast they can be; needs no TPU, no weights and no data",
    "inspect": "one aligned pair as text, with weights where they are known; --data: what becomes of a data set's rows",
    "generate": "answer prompts with the trained student, another model of the run, or any model folder",
}

EPILOG = """\
Settings are keys of the config: --config.train.beta=0.2 --config.data.train=pairs.jsonl
All of them, with their meaning: ctpd_jax/settings.py.

  ctpd run --config configs/demo.py --workdir runs/demo

Give the same command again and it goes on where it stopped. SIGTERM saves first and ends with exit code 75.
"""

PLAN_EPILOG = """\
Compiles the programs of each stage for the topology, or estimates them where the compiler is not installed. All prompts
and responses are taken to be as long as config.data allows. Exit code 3 where something does not fit.

  ctpd plan --config configs/qwen2.5_14b_to_llama3.1_8b.py --topology v5e:4x4 --stage train
  ctpd plan --config configs/colab_v5e.py --topology v5e:1x1
  ctpd plan --config configs/pair.py --config.student.path=DIR --topology v5p:2x2x1 --stage train --search
"""

GENERATE_EPILOG = """\
The answer goes to stdout, and nothing else does. Several prompts are answered together, each under its prompt.

  ctpd generate --config configs/demo.py --workdir runs/demo --prompt "Tell me about tea."
  ctpd generate --folder runs/demo/export --prompt "Tell me about tea." --prompt "And coffee?"
  ctpd generate --folder HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Hi!" --temperature 0.8 --top-k 50 --top-p 0.95
"""


INSPECT_EPILOG = """\
With --data, what becomes of the rows of a data set: how many are used, why others are not, which columns are read, and,
with two tokenizers, what the limits cut. No model is loaded, and no --config is needed.

  ctpd inspect --config configs/demo.py --workdir runs/demo --pair 3
  ctpd inspect --data pairs.jsonl
  ctpd inspect --data pairs.jsonl --teacher DIR --student DIR --config.data.max_response_tokens=256
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="ctpd",
        description="Cross-tokenizer preference distillation: a small model learns a big one's preferences.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog={"generate": GENERATE_EPILOG, "plan": PLAN_EPILOG, "inspect": INSPECT_EPILOG}.get(name, EPILOG),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        needed = name not in ("generate", "inspect")
        command.add_argument("--config", required=needed, metavar="FILE.py", help="a file with get_config()")
        if name == "plan":
            add_plan_arguments(command)
            continue
        command.add_argument("--workdir", required=needed, metavar="DIR", type=Path, help="where the run lives")
        if name == "sft":
            command.add_argument("--model", choices=["teacher", "student"], help="only this one")
        if name == "dpo":
            which = command.add_mutually_exclusive_group()
            which.add_argument("--reverse", action="store_true", help="train the negative model, sides swapped")
            which.add_argument("--student", action="store_true", help="train the plain DPO student, for comparison")
        if name == "inspect":
            command.add_argument("--pair", type=int, default=0, metavar="N", help="the N-th pair of the training data")
            command.add_argument("--data", metavar="FILE", help="a data set, as config.data.train takes it")
            command.add_argument("--split", default="train", help="of the data set (default: train)")
            for model in ("teacher", "student"):
                command.add_argument(f"--{model}", metavar="DIR", help=f"folder or hub id with the {model}'s tokenizer")
        if name == "generate":
            add_generate_arguments(command)
    return top


def add_plan_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--topology", required=True, metavar="KIND:GRID", help="v5e:1x1, v5e:4x4, v6e:2x2, v5p:2x2x1 ..."
    )
    command.add_argument(
        "--stage",
        action="append",
        choices=(*TRAINED, "annotate"),
        metavar="STAGE",
        help=f"only this one; may be repeated: {', '.join((*TRAINED, 'annotate'))}",
    )
    command.add_argument(
        "--search", action="store_true", help="of each stage by itself, look for a mesh and a micro-batch that fit"
    )
    command.add_argument("--estimate", action="store_true", help="by arithmetic alone, without compiling")
    command.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the peak arithmetic, for the second figure of pairs per second (default: 0.4)",
    )


def add_generate_arguments(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--model",
        default="ctpd",
        metavar="ROW",
        help="which model of the run, by its name in the evaluation's table: student_start, student_dpo, ctpd, "
        "teacher, teacher_dpo (default: ctpd)",
    )
    which.add_argument(
        "--folder",
        metavar="DIR_OR_HUB_ID",
        help="a model in Hugging Face format instead of a run's; takes no --config and no --workdir",
    )
    command.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="what the user says; may be repeated"
    )
    command.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="the longest answer, in tokens (default: 128)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (the default), 1 draws by the model's probabilities, less is safer",
    )
    command.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: 0, from all)"
    )
    command.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P, of what --top-k leaves (default: 1)",
    )
    command.add_argument(
        "--seed", type=int, metavar="N", help="of the draws (default: the config's seed, 0 with --folder)"
    )
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="the answer ends before this text, such as $'\\n' in bash; may be repeated",
    )


def load_config(path: str | None, overrides: Sequence[str]) -> ConfigDict:
    """Reads a config file, or takes the defaults, and applies --config.key=value.

    Raises:
      UserError: no such file, no get_config in it, an unknown key, a value of the wrong type.
    """
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
    except UserError:
        raise
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
    config = load_config(known.config, overrides)
    config.data.train = known.data
    check_config(config)
    paths = [getattr(known, model) or config[model].path for model in ("teacher", "student")]
    if any(paths) and not all(paths):
        raise UserError("give both --teacher and --student, or neither: pairs are cut where both tokenizers agree.")
    from ctpd_jax.text.columns import Reading
    from ctpd_jax.text.overview import overview
    from ctpd_jax.text.prepare import Limits

    settings = [config[model] for model in ("teacher", "student")]
    models = [(path, each.template, each.template_variables) for path, each in zip(paths, settings) if path]
    limit, reading, limits = config.data.limit or None, Reading.of(config.data), Limits.of(config.data)
    overview(known.data, known.split, limit, reading, limits, models, print)
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
    from ctpd_jax import assess

    assess.answer_from_folder(known.folder, known.prompt, assess.sampling_of(known, seed=0))
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character of some text ends no run
        sys.stdout.reconfigure(errors="replace")
    known, overrides = parser().parse_known_args(arguments)
    if known.command in ("inspect", "generate", "plan"):  # nothing of theirs could go on: SIGTERM ends them at once
        return exit_code(known, overrides)
    with preempt.listening():
        return exit_code(known, overrides)


def exit_code(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Carries the command out and tells what ended it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, which is not needed
    try:
        if known.command == "generate" and answered_from_folder(known, overrides):
            return 0
        if known.command == "inspect" and inspected_data(known, overrides):
            return 0
        config = load_config(known.config, overrides)
        if known.command == "plan" and not config.data.train:
            config.data.train = "none.jsonl"  # no data are read
        check_config(config)
        if known.command == "plan":
            from ctpd_jax.plan import chips

            chips.quiet_compiler()
            from ctpd_jax.plan.command import plan_command

            return plan_command(known, config)
        if config.platform != "auto":
            os.environ["JAX_PLATFORMS"] = config.platform
        from ctpd_jax import pipeline  # JAX reads its environment when it is imported

        pipeline.command(known, config)
    except UserError as error:
        print(f"ctpd {known.command}: {error}", file=sys.stderr)
        return 2
    except preempt.Preempted as stop:
        print(f"ctpd {known.command}: stopped {stop}. The same command goes on from there.", file=sys.stderr)
        return preempt.EXIT_CODE
    except KeyboardInterrupt:
        print(
            f"\nctpd {known.command}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
