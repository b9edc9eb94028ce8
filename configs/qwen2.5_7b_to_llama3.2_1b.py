"""Qwen2.5 7B teaches Llama 3.2 1B, the paper's smaller pair (arXiv 2601.11865), on a v5e:2x4 slice, 8 chips.

    ctpd run --config configs/qwen2.5_7b_to_llama3.2_1b.py --workdir runs/qwen2.5_7b_to_llama3.2_1b

Llama is gated on the hub: accept its licence there and log in (`hf auth login`, or HF_TOKEN), or give a local folder,
--config.student.path=DIR.

A chip has 15.75 GiB = 16.9 GB. Trained whole, a parameter takes 16 bytes: itself, gradient, two moments, in float32.
The student, 1.24e9 x 16 / 8 chips = 2.5 GB, is trained whole. The teacher, 7.62e9 x 16 / 8 = 15.2 GB, would
leave no room for a micro-batch's own gradient and its activations: its stages train adapters over a bfloat16 base,
1.9 GB. Not tried on that slice: memory is `ctpd plan`'s count, and the adapters' settings are a guess.
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import paper_on_tpu


def get_config() -> ConfigDict:
    return paper_on_tpu("Qwen/Qwen2.5-7B", "meta-llama/Llama-3.2-1B", micro_batch=16)
