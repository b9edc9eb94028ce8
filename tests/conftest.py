"""Fixtures that every room's tests may use. Real assets are for slow tests only: building them takes minutes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import real_assets

# The fast tests are small programs that run once or twice: what XLA does to make them faster is most of their time.
# Without fused multiply-add (that is AVX) the same arithmetic gives the same bits whatever the shape around it.
QUICK_COMPILER = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_max_isa=AVX"
)


def pytest_configure(config: pytest.Config) -> None:
    """The fast tests compile quickly; the slow ones and the parity tests as users do. Before JAX is there."""
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = f"{QUICK_COMPILER} {os.environ.get('XLA_FLAGS', '')}"


@pytest.fixture(scope="session")
def real_tokenizers() -> dict[str, Path]:
    """Name -> folder: llama3, qwen2.5, mistral-v0.1, deepseek, smollm2, gemma3. Fails if they cannot be had."""
    return real_assets.real_tokenizers()


@pytest.fixture(scope="session")
def real_models() -> dict[str, Path]:
    """Name -> folder: smollm2-135m-instruct, gemma3-270m. Fails if they cannot be had."""
    return real_assets.real_models()
