"""Several processes that wait for one another end by themselves, and say where they stood."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from ctpd_jax.processes import stall
from ctpd_jax.train.metrics import Progress

STAND = """
import sys, time
import jax
from jax.experimental import multihost_utils
from ctpd_jax.processes import stall
from ctpd_jax.train.metrics import Progress

number, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, number)
multihost_utils.process_allgather(jax.numpy.ones(1))
stall.allow(minutes=0.1)
with Progress(3, "before") as progress:
    time.sleep(4)
    progress.update(1)  # counts from here again
    time.sleep(4)
time.sleep(7)  # nothing is watched
with Progress(3, "train") as progress:
    print("at work", flush=True)
    if number == 1:
        time.sleep(600)  # the other one waits for it
    multihost_utils.process_allgather(jax.numpy.ones(1))
"""


@pytest.mark.slow
def test_both_processes_say_where_they_stand_and_end():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", STAND]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [*command, str(number), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
        )
        for number in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], told
    for out, err in told:
        assert "at work" in out and "Timeout (0:00:06)!" in err
    assert "process_allgather" in told[0][1]  # the one that waits


def test_a_process_that_is_alone_may_take_its_time(monkeypatch):
    armed = []
    monkeypatch.setattr(stall.faulthandler, "dump_traceback_later", lambda *given, **more: armed.append(given))
    monkeypatch.setattr(stall, "_seconds", 60.0)
    with Progress(2, "alone", active=False) as progress:
        progress.update(1)
    assert not armed
    monkeypatch.setattr(stall, "several", lambda: True)
    with Progress(2, "one of two", active=False) as progress:
        progress.update(1)
    assert armed == [(60.0,)] * 2
