"""Runs that several files of this folder look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ADAPTED, MICRO

from ctpd_jax.cli import main


@pytest.fixture(scope="session")
def adapted_micro(made_once) -> Path:
    """The workdir of a whole run whose stages train adapters (helpers.ADAPTED). Who changes it takes a copy."""

    def make(folder: Path) -> None:
        assert main(["run", "--config", MICRO, "--workdir", str(folder), *ADAPTED]) == 0

    return made_once("adapted_micro", make)
