"""What lm-eval's own `hf` model answers. Runs where torch and lm-eval are installed, apart from the tests.

    python lm_eval_reference.py MODEL_FOLDER TASK_FOLDER OUT.json ARGUMENTS

ARGUMENTS is a JSON object: "batch_size", "chat" (by the chat template), "max_length" (of the model). OUT.json then
holds, task by task, the answers to every question: [[log-probability, greedy], ...], a log-probability, or texts; and
under "seconds" how long lm-eval took, the model being loaded.
"""

from __future__ import annotations

import json
import sys
import time

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main() -> None:
    folder, tasks, out, arguments = sys.argv[1:]
    asked = json.loads(arguments)
    model = HFLM(folder, dtype="float32", device="cpu", batch_size=asked["batch_size"], max_length=asked["max_length"])
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = asked.get("tasks") or manager.all_tasks
    seconds = {}
    found = {}
    for name in names:
        start = time.perf_counter()
        results = simple_evaluate(model, tasks=[name], task_manager=manager, apply_chat_template=asked["chat"])
        seconds[name] = time.perf_counter() - start
        found |= {task: [sample["resps"] for sample in own] for task, own in results["samples"].items()}
    with open(out, "w") as stream:
        json.dump({"answers": found, "seconds": seconds}, stream)


if __name__ == "__main__":
    main()
