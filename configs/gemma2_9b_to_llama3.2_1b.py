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

from ctpd_jax.settings import paper_on_tpu


def get_config() -> ConfigDict:
    return paper_on_tpu("google/gemma-2-9b", "meta-llama/Llama-3.2-1B", micro_batch=16)
