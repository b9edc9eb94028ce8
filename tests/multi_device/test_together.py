"""Two processes that wait for each other: as long as it takes, with a word now and then, and not where one is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

WAIT = """
import sys, time
from ctpd_jax.processes import distributed, preempt, together

together.EVERY, distributed.HEARTBEAT_TIMEOUT = 0.5, 5
what, number = sys.argv[1], int(sys.argv[2])
with distributed.joined():
    import jax
    from ctpd_jax.sharding import told_by_first

    for _ in range(3):
        together.meet("begun")
    print("begun", flush=True)
    with preempt.apart("the store is written"):
        if what == f"killed {number}":
            time.sleep(600)
        time.sleep(2.2 * (number == 0))
    assert told_by_first(lambda: time.sleep(1.2) or [number]) == [0]
    if what == "lost":
        together.meet(f"update {number}")
    assert together.client().key_value_dir_get("ctpd/meet/2") == []  # what was left at places of before is gone
    print("together", flush=True)
"""


def started(what: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    told = {"JAX_PLATFORMS": "cpu", "CTPD_COORDINATOR": f"localhost:{port}", "CTPD_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WAIT, what, str(number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | told | {"CTPD_PROCESS": str(number)},
        )
        for number in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_lone_worker_is_waited_for_and_somebody_says_so():
    processes = started("waits")
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert all(out.endswith("together\n") for out, _ in told)
    waited = [line for line in told[1][1].splitlines() if "waited" in line]
    assert waited[:3] == ["the store is written: waited 0 min for process 0"] * 3
    assert waited[-1] == "the first process has looked: waited 0 min for process 0"
    assert "waited" not in told[0][1]


@pytest.mark.slow
def test_processes_that_are_at_different_places_end_with_both():
    processes = started("lost")
    told = [process.communicate(timeout=120) for process in processes]
    assert 0 not in [process.returncode for process in processes]
    assert not any("together\n" in out for out, _ in told)
    # The store goes with process 0: another one that has not read the answer by then ends without it.
    assert "UserError: process 1 is at 'update 1', process 0 at 'update 0': their code, configs" in told[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_died_is_not_waited_for(number):
    processes = started(f"killed {number}")
    died, waits = processes[number], processes[1 - number]
    line = died.stdout.readline()
    while line != "begun\n":  # gloo talks too
        assert line
        line = died.stdout.readline()
    died.send_signal(signal.SIGKILL)
    error = waits.communicate(timeout=120)[1]
    assert waits.returncode not in (0, None)
    # Without process 0 there is no place to meet. JAX, which misses either, ends the rest, and may be the faster one.
    own = number == 0 and "ConnectionError: the store is written: a process that was waited for has died" in error
    assert own or "another task died" in error
