"""How long lm-eval waits for our answers and for those of its own `hf` model, in float32 on the same CPU.

    JAX_PLATFORMS=cpu python benchmarks/harness.py FOLDER [--times N] [--batch-sizes 1 8]

FOLDER is a model in Hugging Face format. The tasks are those of the parity tests, with N times their questions. `hf`
runs in the environment that the tests make for it (tests/helpers/real_assets.py), once for each batch size; the best
counts. Ours are asked twice, since the first time compiles: both are shown, the second counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import HELPERS, real_assets
from helpers.harness_tasks import NAMES, write_tasks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from ctpd_jax.evaluate.harness import DecoderLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch-tokens", type=int, default=8192)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tasks = write_tasks(Path(temporary) / "tasks", asked.times)
        theirs = {size: seconds_of_hf(asked.folder, tasks, size) for size in asked.batch_sizes}
        model = DecoderLM(asked.folder, asked.batch_tokens, dtype="float32")
        manager = TaskManager(include_path=tasks, include_defaults=False)
        first, second = ({name: seconds(model, name, manager) for name in NAMES} for _ in range(2))
    print(f"{'seconds':12} {'first':>7} {'second':>7}", *(f"hf by {size:2}" for size in theirs), "hf's best / second")
    best = {name: min(own[name] for own in theirs.values()) for name in NAMES}
    for name in NAMES:
        others = (f"{own[name]:8.1f}" for own in theirs.values())
        print(f"{name:12} {first[name]:7.1f} {second[name]:7.1f}", *others, f"{best[name] / second[name]:10.2f}")
    ratios = {each: sum(best.values()) / sum(own.values()) for each, own in (("first", first), ("second", second))}
    print(f"all: {ratios['second']:.2f} times as fast as hf; {ratios['first']:.2f} with compiling")


def seconds(model: Any, name: str, manager: TaskManager) -> float:
    start = time.perf_counter()
    simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=0, torch_random_seed=None)
    return time.perf_counter() - start


def seconds_of_hf(folder: str, tasks: str, batch_size: int) -> dict[str, float]:
    asked = json.dumps({"batch_size": batch_size, "chat": False, "max_length": None})
    out = Path(tasks) / "theirs.json"
    real_assets.run_in_assets_venv(HELPERS / "lm_eval_reference.py", folder, tasks, out, asked)
    return json.loads(out.read_text())["seconds"]


if __name__ == "__main__":
    main()
