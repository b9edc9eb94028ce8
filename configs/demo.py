"""The whole chain on a toy world with known rewards: no network, no downloads.

    ctpd run --config configs/demo.py --workdir runs/demo
    python examples/toy/truth.py runs/demo

Another world: --config=configs/demo.py:pairs=500,noise=0.4 (also test_pairs, seed and mismatch: near, word, unigram).
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import toy


def get_config(settings: str = "") -> ConfigDict:
    config = default_config()
    world = toy.world_on_disk(
        **toy.settings_in(settings, pairs=2000, test_pairs=300, noise=0.25, seed=0, mismatch="word")
    )
    config.teacher.path, config.student.path = world.teacher, world.student
    config.data.update({"train": world.train, "test": world.test, "max_prompt_tokens": 64, "max_response_tokens": 96})
    config.rows.update({"layout": "shared", "buckets": 2, "multiple": 16})
    for stage in ("teacher_sft", "student_sft"):
        config[stage].update({"lr": 3e-3, "steps": 0, "epochs": 4.0, "batch_size": 16, "micro_batch": 16, "clip": 1.0})
    # The SFT term keeps the fluency of models this small, which a bare preference loss would spend.
    for stage in ("positive", "negative"):
        config[stage].update({"lr": 5e-4, "beta": 0.1, "sft_weight": 2.0, "batch_size": 16, "micro_batch": 16})
    for stage in ("student_dpo", "train", "student_proposed"):
        config[stage].update({"lr": 3e-4, "beta": 0.1, "sft_weight": 2.0, "batch_size": 16, "micro_batch": 16})
    config.student_dpo.steps = config.student_proposed.steps = 0
    # This world has forty questions: many answers to each, and many pairs of them.
    config.propose.update({"answers": 48, "pairs": 24, "batch": 256})
    config.student_proposed.epochs = 2.0  # as many updates as the others
    config.annotate.micro_batch = 16
    config.evaluate.update({"samples": 200, "max_new_tokens": 80, "temperature": 1.0})
    config.teacher.remat = "dots"
    config.student.remat = "dots"
    return config
