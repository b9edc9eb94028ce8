"""Sharded import on eight simulated devices."""

from __future__ import annotations

import jax
import pytest
from helpers.eight_devices import run_on_eight_devices

from ctpd_jax.models.decoder import init_params
from ctpd_jax.models.hf import save_hf
from ctpd_jax.models.hf.config import from_hf

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": {"model_type": "llama", **SIZES},
    "experts": {"model_type": "mixtral", **SIZES, "num_local_experts": 8, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sharded_import_is_the_plain_one_and_reads_no_more_than_it_needs(tmp_path, name) -> None:
    config = from_hf(CONFIGS[name])
    save_hf(tmp_path / "model", config, init_params(config, jax.random.key(0)), max_shard_bytes=20_000)
    assert "every import agrees" in run_on_eight_devices("import_checks", tmp_path / "model")
