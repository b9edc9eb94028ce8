"""What lm-eval's own `hf` model answers. Runs where torch and lm-eval are installed, apart from the tests.

    python lm_eval_reference.py MODEL_FOLDER TASK_FOLDER OUT.json ARGUMENTS

ARGUMENTS is a JSON object: "batch_size"; "chat", whether by the chat template; "max_length" of the model, or null.
OUT.json then holds "answers", of each task [[[answer], ...] a question], where an answer is [log-probability, greedy],
a log-probability or a text; and "seconds", of each task how long lm-eval took.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main() -> None:
    folder, tasks, out, arguments = sys.argv[1:]
    asked = json.loads(arguments)
    model = HFLM(folder, dtype="float32", device="cpu", batch_size=asked["batch_size"], max_length=asked["max_length"])
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found: dict[str, Any] = {"answers": {}, "seconds": {}}
    for name in manager.all_tasks:
        settings = {"task_manager": manager, "apply_chat_template": asked["chat"], "bootstrap_iters": 0}
        start = time.perf_counter()
        results = simple_evaluate(model, tasks=[name], **settings)
        found["seconds"][name] = time.perf_counter() - start
        found["answers"][name] = [sample["resps"] for sample in results["samples"][name]]
    with open(out, "w") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    main()
