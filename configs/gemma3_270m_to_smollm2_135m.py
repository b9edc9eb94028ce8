"""Gemma 3 270M (262,144 tokens, SentencePiece) teaches SmolLM2 135M Instruct (49,152 tokens, byte-level BPE).

    ctpd run --config configs/gemma3_270m_to_smollm2_135m.py --config.data.train=train.jsonl \\
        --config.data.test=test.jsonl --workdir runs/real_pair

Local folders instead of the hub: --config.teacher.path=DIR --config.student.path=DIR.
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.teacher.path = "google/gemma-3-270m"
    config.student.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.max_prompt_tokens = 96
    config.data.max_response_tokens = 256
    config.data.limit = 240  # 60 updates of 4 pairs
    config.data.test_limit = 200
    config.rows.layout = "shared"
    for stage in (config.positive, config.negative, config.train):
        stage.update({"lr": 1e-5, "steps": 60, "batch_size": 4, "micro_batch": 1, "save_every": 20})
    config.teacher_sft.update({"lr": 1e-5, "steps": 30, "batch_size": 4, "micro_batch": 2, "save_every": 30})
    config.teacher.remat = "dots"
    config.student.remat = "dots"
    config.annotate.micro_batch = 2
    return config
