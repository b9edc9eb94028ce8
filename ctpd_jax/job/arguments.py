"""The arguments of every command, and what `--help` says of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ctpd_jax.artifacts import is_url
from ctpd_jax.job.table import PLANNED, STAGES

COMMANDS = {
    "run": "every stage in order; picks up where it stopped",
    "sft": "supervised fine-tuning of teacher and student",
    "dpo": "the contrastive pair: DPO, and with --reverse the pair swapped; --student: the same of the student",
    # Every other stage has a command of its own name; one that shares another's has an argument below.
    **{name: stage.says for name, stage in STAGES.items() if stage.command == f"ctpd {name}"},
    "plan": "whether the stages fit a slice of TPUs, and how fast they can be; needs no TPU, no weights and no data",
    "inspect": "one pair as both models read it, or --stats of all; --data: what becomes of a data set's rows",
    "table": "the pairs as a Parquet file: tokens, spans, and once they are annotated log-probabilities and weights",
    "report": "the page of a run as far as it has come, DIR/report.html; every stage writes it too",
    "status": "how far a run has come, from any machine that sees DIR",
    "judge": "which of two models answers better, by a judge behind an OpenAI-compatible endpoint",
    "generate": "answer prompts with the trained student, another model of the run, or any model folder",
}

LOOKING = ("inspect", "generate", "plan", "report", "status", "judge", "table")  # they change no run

EPILOG = """\
Settings are keys of the config: --config.train.beta=0.2 --config.data.train=pairs.jsonl
All of them, with their meaning: ctpd_jax/settings.py.

  ctpd run --config configs/demo.py --workdir runs/demo

Give the same command again and it goes on where it stopped. SIGTERM saves first and ends with exit code 75.
"""

EPILOGS = {
    "plan": """\
Compiles the programs of each stage for the topology, or estimates them where the compiler is not installed. All prompts
and responses are taken to be as long as config.data allows. Exit code 3 where something does not fit.

  ctpd plan --config configs/qwen2.5_14b_to_llama3.1_8b.py --topology v5e:4x4 --stage train
  ctpd plan --config configs/colab_v5e.py --topology v5e:1x1
  ctpd plan --config configs/pair.py --config.student.path=DIR --topology v5p:2x2x1 --stage train --search
""",
    "judge": """\
Each instruction that both files answer is judged in both orders. The key of the endpoint is read from OPENAI_API_KEY.
What the judge has said is kept beside --out: give the same command again and it goes on where it stopped.

  ctpd generate --folder A --prompts test.jsonl --out a.json
  ctpd generate --folder B --prompts test.jsonl --out b.json
  ctpd judge a.json b.json --url http://localhost:8000/v1/ --model NAME --out a_b.json
""",
    "generate": """\
The answer goes to stdout, and nothing else does. Several prompts are answered together, each under its prompt. With
--prompts the answers go to --out.

  ctpd generate --config configs/demo.py --workdir runs/demo --prompt "Tell me about tea."
  ctpd generate --folder runs/demo/export --prompt "Tell me about tea." --prompt "And coffee?"
  ctpd generate --folder runs/demo/export --prompts test.jsonl --out answers.json --max-new-tokens 512
  ctpd generate --folder HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Hi!" --temperature 0.8 --top-k 50 --top-p 0.95
""",
    "inspect": """\
Of a run the weights are shown too, once its pairs were annotated. A pair that must not reach training (a response that
does not end on its end of turn, a doubled BOS, a span without tokens of one model) ends it with exit code 2.

With --data, what becomes of the rows of a data set: how many are used, why others are not, which columns are read, and,
with two tokenizers, what the limits cut. No model is loaded, and no --config is needed.

  ctpd inspect --config configs/demo.py --workdir runs/demo --pair 3 --html pair.html
  ctpd inspect --data pairs.jsonl
  ctpd inspect --data pairs.jsonl --teacher DIR --student DIR --stats --config.data.max_response_tokens=256
""",
    "table": """\
A row a pair; docs/elsewhere.md lists the columns. With log-probabilities put into it, config.annotate.table takes it.

  ctpd table --config configs/demo.py --workdir runs/demo --out pairs.parquet
""",
    "evaluate": """\
With --harness, lm-eval asks the run's models, or a model folder, the questions of its tasks (docs/evaluate.md).

  ctpd evaluate --config configs/demo.py --workdir runs/demo
  ctpd evaluate --config configs/demo.py --workdir runs/demo --harness --model ctpd --model student_start
  ctpd evaluate --harness arc_easy:0,gsm8k:5 --folder runs/demo/export --workdir runs/scores --limit 100
""",
}
# The paper's tasks and shots.
HARNESS = "hellaswag:10,arc_challenge:25,mmlu:5,truthfulqa_mc2:0,winogrande:5,gsm8k:5"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="ctpd",
        description="Cross-tokenizer preference distillation: a small model learns a big one's preferences.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # One parser a command, with the arguments that only it has.
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=EPILOGS.get(name, EPILOG),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        needed = name not in ("generate", "inspect")
        if name not in ("report", "status", "judge"):
            command.add_argument(
                "--config", required=needed and name != "evaluate", metavar="FILE.py", help="a file with get_config()"
            )
        if name == "plan":
            add_plan_arguments(command)
            continue
        if name == "judge":
            command.add_argument("answers", nargs=2, type=file, metavar="FILE.json", help="answers of two models")
            command.add_argument("--url", required=True, help="of the endpoint, as far as chat/completions")
            command.add_argument("--model", required=True, help="of the endpoint, that judges")
            command.add_argument("--out", required=True, type=file, metavar="FILE.json", help="where the result goes")
            command.add_argument("--parallel", type=int, default=4, metavar="N", help="questions at once (default: 4)")
            continue
        command.add_argument(
            "--workdir",
            required=needed,
            metavar="DIR",
            type=workdir,
            help="where the run lives; may be gs://BUCKET/NAME",
        )
        if name not in LOOKING:
            command.add_argument("--quiet", action="store_true", help="show only warnings, errors, and what is there")
            command.add_argument("--log", metavar="FILE", type=file, help="all that is said, as JSON lines too")
        if name == "table":
            command.add_argument("--out", required=True, type=file, metavar="FILE.parquet", help="where the table goes")
        if name == "sft":
            command.add_argument("--model", choices=["teacher", "student"], help="only this one")
        if name == "dpo":
            command.add_argument("--reverse", action="store_true", help="train the negative model, sides swapped")
            command.add_argument("--student", action="store_true", help="of the plain DPO student, for comparison")
        if name == "train":
            command.add_argument("--proposed", action="store_true", help="train the student of `ctpd propose`'s pairs")
        if name == "export":
            command.add_argument("--push", metavar="OWNER/NAME", help="upload it to the hub; the token is HF_TOKEN's")
            command.add_argument("--private", action="store_true", help="the repository that --push makes")
            command.add_argument("--dry-run", action="store_true", help="list what --push would send, and send nothing")
        if name == "inspect":
            command.add_argument(
                "--pair", metavar="N", help="which pair: its number from 0 (the first, of a run), its id, or random"
            )
            command.add_argument(
                "--stats", action="store_true", help="of all pairs: how spans, cuts and weights are spread"
            )
            command.add_argument("--html", type=file, metavar="FILE", help="the pair as a page, too")
            command.add_argument("--data", metavar="FILE", help="a data set, as config.data.train takes it")
            command.add_argument("--split", default="train", help="of the data set (default: train)")
            for model in ("teacher", "student"):
                command.add_argument(f"--{model}", metavar="DIR", help=f"folder or hub id with the {model}'s tokenizer")
        if name == "generate":
            add_generate_arguments(command)
        if name == "evaluate":
            add_harness_arguments(command)
    return top


def workdir(text: str) -> str | Path:
    """A local folder, or the URL of one in a bucket, which pathlib would garble."""
    return text if is_url(text) else Path(text)


def file(text: str) -> Path:
    """What is written, and by the name of a local file alone."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} lies in a bucket; name a local file, and copy it there.")
    return Path(text)


def add_harness_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("lm-eval")
    group.add_argument(
        "--harness",
        nargs="?",
        const=HARNESS,
        metavar="TASK[:SHOTS],...",
        help=f"ask these tasks of lm-eval, instead of the evaluation on held-out pairs (by default {HARNESS})",
    )
    group.add_argument("--harness-tasks", metavar="DIR", help="a folder with more tasks, as YAML files")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--model", action="append", metavar="ROW", help="only this row of the table; may be repeated (default: all)"
    )
    which.add_argument(
        "--folder", metavar="DIR_OR_HUB_ID", help="a model in Hugging Face format instead of a run's; without --config"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    group.add_argument("--chat-template", action="store_true", help="ask as a user, by the model's chat template")
    group.add_argument("--log-samples", action="store_true", help="write every question with its answer too")
    group.add_argument(
        "--batch-tokens", type=int, default=8192, metavar="N", help="tokens of a batch and process (default: 8192)"
    )


def add_plan_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--topology", required=True, metavar="KIND:GRID", help="v5e:1x1, v5e:4x4, v6e:2x2, v5p:2x2x1, 2xv5e:16x16 ..."
    )
    command.add_argument(
        "--stage",
        action="append",
        choices=PLANNED,
        metavar="STAGE",
        help=f"only this one; may be repeated: {', '.join(PLANNED)}",
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
        "ctpd_proposed, teacher, teacher_dpo, or a baseline's such as student_tis (default: ctpd)",
    )
    which.add_argument(
        "--folder",
        metavar="DIR_OR_HUB_ID",
        help="a model in Hugging Face format instead of a run's; takes no --config and no --workdir",
    )
    command.add_argument(
        "--prompt", default=[], action="append", metavar="TEXT", help="what the user says; may be repeated"
    )
    command.add_argument(
        "--prompts", metavar="FILE", help="a data set of prompts instead, as config.data.train takes it"
    )
    command.add_argument("--split", default="train", help="of --prompts (default: train)")
    command.add_argument("--limit", type=int, metavar="N", help="the first N of --prompts (default: all)")
    command.add_argument(
        "--out", type=file, metavar="FILE.json", help="where their answers go, as AlpacaEval writes them"
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
