"""Runs a helper in a process of its own that sees eight simulated devices: JAX must be asked for them as it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def run_on_eight_devices(helper: str, *arguments: str | Path, quick: bool = True) -> str:
    """What `python -m helpers.HELPER ARGUMENTS` prints.

    Args:
        helper: the module's name; its process must end with exit code 0.
        quick: compile as quickly as the tests around it (conftest.py); False: as users do.
    """
    flags = os.environ.get("XLA_FLAGS", "") if quick else ""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", f"helpers.{helper}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout
