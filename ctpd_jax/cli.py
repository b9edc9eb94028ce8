"""The command line: parse, call, exit. What each command does stands in pipeline.py.

Exit codes: 0 done, 2 the user can mend it (one sentence on stderr), 130 interrupted; anything else is a bug of ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from ctpd_jax.errors import UserError
from ctpd_jax.settings import check_config

COMMANDS = {
    "run": "every stage in order; picks up where it stopped",
    "sft": "supervised fine-tuning of teacher and student",
    "dpo": "the contrastive pair: DPO, and with --reverse the pair swapped; --student: the plain DPO student",
    "annotate": "span log-probabilities of reference, contrastive pair and start -> DIR/annotations",
    "train": "CTPD of the student on the annotated data",
    "evaluate": "preference accuracies, lambda, sampled answers -> DIR/evaluation.json, DIR/report.html",
    "export": "the trained student in Hugging Face format -> DIR/export",
    "inspect": "one aligned pair as text: both tokenizations, spans, and weights where they are known",
    "generate": "answer a prompt with the trained student, or another model of the run",
}

EPILOG = """\
Settings are keys of the config: --config.train.beta=0.2 --config.data.train=pairs.jsonl
All of them, with their meaning: ctpd_jax/settings.py.

  ctpd run --config configs/demo.py --workdir runs/demo
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
            name, help=text, description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--config", required=True, metavar="FILE.py", help="a file with get_config()")
        command.add_argument("--workdir", required=True, metavar="DIR", type=Path, help="where the run lives")
        if name == "sft":
            command.add_argument("--model", choices=["teacher", "student"], help="only this one")
        if name == "dpo":
            which = command.add_mutually_exclusive_group()
            which.add_argument("--reverse", action="store_true", help="train the negative model, sides swapped")
            which.add_argument("--student", action="store_true", help="train the plain DPO student, for comparison")
        if name == "inspect":
            command.add_argument("--pair", type=int, default=0, metavar="N", help="the N-th pair of the training data")
        if name == "generate":
            command.add_argument("--model", default="ctpd", help="a row of the evaluation's table (default: ctpd)")
            command.add_argument("--prompt", required=True, help="what the user says")
            command.add_argument("--max-new-tokens", type=int, default=128)
            command.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    return top


def load_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Reads a config file and applies --config.key=value.

    Raises:
      UserError: no such file, no get_config in it, an unknown key, a value of the wrong type.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no config file {path}.")
    values = flags.FlagValues()
    line = ["ctpd", f"--config={path}", *overrides]
    holder = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=line)
    try:
        left = values(line)
        if left[1:]:
            raise UserError(f"What does {left[1]!r} mean? Settings are written --config.key=value.")
        return values[holder.name].value
    except UserError:
        raise
    except (AttributeError, KeyError) as error:
        raise UserError(f"{path}: {str(error).strip(chr(34))} All keys stand in ctpd_jax/settings.py.") from error
    except Exception as error:  # a config file is code: whatever it raises is told, not traced
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    known, overrides = parser().parse_known_args(arguments)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, which is not needed
    try:
        config = load_config(known.config, overrides)
        check_config(config)
        if config.platform != "auto":
            os.environ["JAX_PLATFORMS"] = config.platform
        from ctpd_jax import pipeline  # JAX reads its environment when it is imported

        pipeline.command(known, config)
    except UserError as error:
        print(f"ctpd {known.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nctpd {known.command}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
