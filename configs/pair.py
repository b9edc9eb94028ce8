"""Any two models and your own pairs, with the settings of the paper (arXiv 2601.11865) where it gives them.

    ctpd run --config configs/pair.py --workdir runs/mine --config.teacher.path=TEACHER --config.student.path=STUDENT \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl

One epoch in every stage. How long that takes is for models and data to say: `ctpd run` shows the time that is left.
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.update({"max_prompt_tokens": 128, "max_response_tokens": 384})
    config.rows.layout = "shared"
    config.teacher_sft.update({"lr": 4e-6, "steps": 0, "epochs": 1.0, "batch_size": 16})
    config.student_sft.update({"lr": 4e-6, "steps": 0, "epochs": 1.0, "batch_size": 16})
    config.positive.update({"lr": 2e-6, "beta": 0.3, "batch_size": 16})
    config.negative.update({"lr": 2e-6, "beta": 0.3, "batch_size": 16})
    config.train.update({"lr": 1e-6, "beta": 0.1, "batch_size": 16})
    return config
