"""The whole chain as small as it gets, for the tests: a few pairs, and a few updates of every stage.

ctpd run --config configs/micro.py --workdir runs/micro
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.update({"train": "toy", "test": "toy", "max_prompt_tokens": 64, "max_response_tokens": 64})
    config.toy.update({"pairs": 48, "test_pairs": 16})
    config.rows.update({"layout": "shared", "buckets": 1})
    for stage in ("teacher_sft", "student_sft", "positive", "negative", "train", "student_dpo"):
        config[stage].update({"lr": 1e-3, "steps": 4, "batch_size": 8, "micro_batch": 8, "save_every": 2})
    config.annotate.update({"pairs_per_shard": 16, "micro_batch": 8})
    config.evaluate.update({"samples": 2, "max_new_tokens": 8})
    config.teacher.remat = "dots"
    config.student.remat = "dots"
    return config
