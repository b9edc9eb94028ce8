"""Fixtures that every room's tests may use. Real assets are for slow tests only: building them takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_assets  # this folder is on the path: conftest.py lies in it


@pytest.fixture(scope="session")
def real_tokenizers() -> dict[str, Path]:
    """Name -> folder: llama3, qwen2.5, mistral-v0.1, deepseek, smollm2, gemma3. Fails if they cannot be had."""
    return real_assets.real_tokenizers()


@pytest.fixture(scope="session")
def real_models() -> dict[str, Path]:
    """Name -> folder: smollm2-135m-instruct, gemma3-270m. Fails if they cannot be had."""
    return real_assets.real_models()
