"""`ctpd` in processes of its own, with simulated devices: one, or two that are one job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

CTPD = [sys.executable, "-m", "ctpd_jax.cli"]


def environment(devices: int) -> dict[str, str]:
    """Of a process that sees so many simulated devices."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": flags}


def one_process(workdir: Path, devices: int, arguments: list[str]) -> None:
    command = [*CTPD, *arguments, "--workdir", str(workdir)]
    done = subprocess.run(command, env=environment(devices), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def two_processes(workdir: Path, arguments: list[str], ctpd: list[str] = CTPD) -> list[subprocess.Popen]:
    """The same without the launcher, which tells only how the first one ended; each has a log of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for number in range(2):
        own = {"CTPD_COORDINATOR": address, "CTPD_PROCESSES": "2", "CTPD_PROCESS": str(number)}
        with open(workdir.with_suffix(f".{number}.log"), "wb") as log:
            started.append(
                subprocess.Popen(
                    [*ctpd, *arguments, "--workdir", str(workdir)],
                    stdout=log, stderr=subprocess.STDOUT, env=environment(4) | own,
                )
            )  # fmt: skip
    return started
