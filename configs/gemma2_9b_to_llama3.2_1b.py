"""Gemma 2 9B (256,000 tokens, SentencePiece) teaches Llama 3.2 1B (byte-level BPE) on a v5e:2x4 slice, 8 chips.

    ctpd run --config configs/gemma2_9b_to_llama3.2_1b.py --workdir runs/gemma2_9b_to_llama3.2_1b

Gemma and Llama are gated on the hub: accept their licences there and log in (`hf auth login`, or HF_TOKEN), or give
local folders, --config.teacher.path=DIR --config.student.path=DIR.

A chip has 15.75 GiB = 16.9 GB. Trained whole, a parameter takes 16 bytes: itself, gradient, two moments, in float32.
The student, 1.24e9 x 16 / 8 chips = 2.5 GB, is trained whole. The teacher, 9.24e9 x 16 / 8 = 18.5 GB, does not fit:
its stages train adapters over a bfloat16 base, 2.3 GB. Not tried on that slice: memory is `ctpd plan`'s count, and the
adapters' settings are a guess.
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.teacher.path = "google/gemma-2-9b"
    config.student.path = "meta-llama/Llama-3.2-1B"
    config.data.train = config.data.test = "hf:HuggingFaceH4/ultrafeedback_binarized"
    config.data.update({"train_split": "train_prefs", "test_split": "test_prefs"})
    config.data.update({"max_prompt_tokens": 128, "max_response_tokens": 384})  # 128 and 512 in all: the paper's code

    # The paper's: one epoch in every stage, learning rates, betas, 16 pairs an update, warmup, AdamW (the defaults).
    config.student_sft.update({"steps": 0, "lr": 4e-6, "batch_size": 64})  # the paper: 16 to 128
    config.train.update({"lr": 1e-6, "beta": 0.1, "batch_size": 16})
    for stage in (config.positive, config.negative):
        stage.update({"beta": 0.3, "batch_size": 16})

    # Ours: adapters instead of all of the teacher, and ten times the paper's rates for them.
    config.teacher_sft.update({"steps": 0, "batch_size": 64})
    for stage, lr in ((config.teacher_sft, 4e-5), (config.positive, 2e-5), (config.negative, 2e-5)):
        stage.lr = lr
        stage.lora.update({"rank": 16, "alpha": 32.0, "base": "bfloat16"})
    config.annotate.update({"teacher_weights": "bfloat16", "micro_batch": 8})

    # Ours: a pair, at most 128 + 2 x 384 tokens, fits a row, and a micro-batch gives every chip at least one.
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.rows.update({"layout": "shared", "packed": "yes", "length": 1024, "multiple": 128})
    for stage in (config.teacher_sft, config.student_sft, config.positive, config.negative, config.train):
        stage.micro_batch = 16
    return config
