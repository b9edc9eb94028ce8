"""Qwen2.5 14B teaches Llama 3.1 8B: the paper's main experiment (arXiv 2601.11865), on a v5e:4x4 slice, 16 chips.

    ctpd run --config configs/qwen2.5_14b_to_llama3.1_8b.py --workdir runs/qwen2.5_14b_to_llama3.1_8b

Llama is gated on the hub: accept its licence there and log in (`hf auth login`, or HF_TOKEN), or give a local folder,
--config.student.path=DIR. How to start a command on every host of a slice: docs/launch.md.

A chip has 15.75 GiB = 16.9 GB. Trained whole, a parameter takes 16 bytes: itself, gradient, two moments, in float32.
The student, 8.03e9 x 16 / 16 chips = 8.0 GB, is trained whole. The teacher, 14.8e9 x 16 / 16 = 14.8 GB, would leave no
room for a micro-batch's own gradient and its activations: its stages train adapters over a bfloat16 base, 1.8 GB. The
paper trains all of it; on v5e:4x8 that is 7.4 GB: --config.positive.lora.rank=0 --config.positive.lora.base=float32
--config.positive.lr=2e-6, and so for `negative` and `teacher_sft` (lr 4e-6).

Annotation is divided among hosts, each with the whole teacher on its 4 chips: 7.4 GB a chip in bfloat16, and not in
float32. Not tried on that slice: memory is `ctpd plan`'s count, and the adapters' settings are a guess.
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.teacher.path = "Qwen/Qwen2.5-14B"
    config.student.path = "meta-llama/Llama-3.1-8B"
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
    for stage in (config.teacher_sft, config.student_sft):
        stage.micro_batch = 32
    for stage in (config.positive, config.negative, config.train):
        stage.micro_batch = 16
    # A checkpoint of the student in training is 96 GB.
    config.student_sft.save_every = config.train.save_every = 500
    return config
