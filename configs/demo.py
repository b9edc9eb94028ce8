"""The whole chain on a toy world with known rewards: no network, no downloads.

ctpd run --config configs/demo.py --workdir runs/demo
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.update({"train": "toy", "test": "toy", "max_prompt_tokens": 64, "max_response_tokens": 96})
    config.toy.update({"pairs": 2000, "test_pairs": 300, "noise": 0.2})
    config.rows.update({"layout": "shared", "buckets": 2})
    config.teacher_sft.update({"lr": 3e-3, "epochs": 3.0, "batch_size": 32, "micro_batch": 32, "clip": 1.0})
    config.student_sft.update({"lr": 3e-3, "epochs": 3.0, "batch_size": 32, "micro_batch": 32, "clip": 1.0})
    for stage in ("positive", "negative"):
        config[stage].update({"lr": 5e-4, "beta": 0.1, "batch_size": 32, "micro_batch": 32})
    for stage in ("student_dpo", "train"):
        config[stage].update({"lr": 5e-4, "beta": 0.1, "batch_size": 32, "micro_batch": 32})
    config.student_dpo.steps = 0
    config.annotate.update({"micro_batch": 32})
    config.evaluate.update({"samples": 48, "max_new_tokens": 80, "temperature": 1.0})
    config.teacher.remat = False
    config.student.remat = False
    return config
