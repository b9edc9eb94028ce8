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

from ctpd_jax.settings import paper_on_tpu


def get_config() -> ConfigDict:
    config = paper_on_tpu("Qwen/Qwen2.5-14B", "meta-llama/Llama-3.1-8B", micro_batch=16, layout="response")
    config.teacher_sft.micro_batch = config.student_sft.micro_batch = 32
    # A checkpoint of the student in training is 96 GB.
    config.student_sft.save_every = config.train.save_every = 500
    return config
