"""Runs import_checks.py on eight simulated devices, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ctpd_jax.models.decoder import init_params
from ctpd_jax.models.hf import save_hf
from ctpd_jax.models.hf.config import from_hf

ROOT = Path(__file__).parents[2]
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
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, Path(__file__).with_name("import_checks.py"), tmp_path / "model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "every import agrees" in done.stdout, done.stdout + done.stderr[-4000:]
