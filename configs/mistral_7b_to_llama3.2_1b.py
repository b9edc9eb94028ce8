"""Mistral 7B v0.3 (32,768 tokens, SentencePiece) teaches Llama 3.2 1B (byte-level BPE) on a v5e:2x2 slice, 4 chips.

    ctpd run --config configs/mistral_7b_to_llama3.2_1b.py --workdir runs/mistral_7b_to_llama3.2_1b

Llama is gated on the hub: accept its licence there (and Mistral's, if it asks) and log in (`hf auth login`,
or HF_TOKEN), or give a local folder, --config.student.path=DIR.

A chip has 15.75 GiB = 16.9 GB. Trained whole, a parameter takes 16 bytes: itself, gradient, two moments, in float32.
The student, 1.24e9 x 16 / 4 chips = 4.9 GB, is trained whole. The teacher, 7.25e9 x 16 / 4 = 29.0 GB, does not fit:
its stages train adapters over a bfloat16 base, 3.6 GB. Not tried on that slice: memory is `ctpd plan`'s count, and the
adapters' settings are a guess.
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import paper_on_tpu


def get_config() -> ConfigDict:
    return paper_on_tpu("mistralai/Mistral-7B-v0.3", "meta-llama/Llama-3.2-1B", micro_batch=8)
