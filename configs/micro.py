"""For the tests, not for use: the whole chain as small as it gets, a few pairs and a few updates of every stage.

ctpd run --config configs/micro.py --workdir runs/micro
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import toy


def get_config(settings: str = "") -> ConfigDict:
    config = default_config()
    world = toy.world_on_disk(**toy.settings_in(settings, pairs=48, test_pairs=16, noise=0.25, seed=0, mismatch="word"))
    config.teacher.path, config.student.path = world.teacher, world.student
    config.data.update({"train": world.train, "test": world.test, "max_prompt_tokens": 64, "max_response_tokens": 64})
    config.rows.update({"layout": "shared", "buckets": 1})
    for stage in ("teacher_sft", "student_sft", "positive", "negative", "train", "student_dpo", "student_proposed"):
        config[stage].update({"lr": 1e-3, "steps": 4, "batch_size": 8, "micro_batch": 8, "save_every": 2})
    config.student_proposed.steps = -1
    config.propose.batch = 16
    config.annotate.update({"pairs_per_shard": 16, "micro_batch": 8})
    config.evaluate.update({"samples": 2, "max_new_tokens": 8})
    config.teacher.remat = "dots"
    config.student.remat = "dots"
    return config
