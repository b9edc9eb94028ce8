"""One run on several processes: how they find each other, and how each of them leaves.

The environment says that there are several; launch/ sets it:

  CTPD_COORDINATOR=HOST:PORT, CTPD_PROCESSES=N, CTPD_PROCESS=K   process 0 answers at HOST:PORT (launch/local.sh)
  CTPD_DISTRIBUTED=detect                                        JAX asks the platform (launch/tpu_vm.sh)
  what `srun` sets for a step of several tasks                   one process per GPU (launch/slurm.sh)
  TPU_WORKER_HOSTNAMES, MEGASCALE_NUM_SLICES                     several TPU hosts or slices (launch/gke_jobset.yaml)

With none of these a process is alone, and nothing here does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ctpd_jax.errors import UserError
from ctpd_jax.processes.preempt import EXIT_CODE, Preempted
from ctpd_jax.processes.together import client

HEARTBEAT_TIMEOUT = 30  # seconds after which a process that is silent counts as dead, and the others end; JAX: 100
START_TIMEOUT = 300  # seconds that a process waits for the others to start
LAST_WORK = 600  # seconds that processes wait for one another at the end, where nobody has work left
LAST_SAVE = 60  # seconds that one that was asked to stop waits for the others
_NAMES = ("CTPD_COORDINATOR", "CTPD_PROCESSES", "CTPD_PROCESS")
_SRUN = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Make this process one of all that the environment speaks of; to be entered before JAX has devices.

    At the end every process waits for the others. One that fails does not: it leaves with its own exit code and at
    once, so that a launcher sees it, where JAX would wait for the others, give up, and abort with a code of its own.
    """
    start()
    try:
        yield
    except Preempted:
        _leave_together(LAST_SAVE, code=EXIT_CODE)
        raise
    except BaseException as error:
        if jax.distributed.is_initialized():
            # Runs before what JAX has registered, which would wait.
            atexit.register(_exit_now, _exit_code(error))
        raise
    _leave_together(LAST_WORK, code=1)


def start() -> None:
    """Join the other processes, where the environment says that there are some.

    Raises:
      UserError: CTPD_COORDINATOR, CTPD_PROCESSES and CTPD_PROCESS do not belong together.
      ConnectionError: JAX could not start; another attempt may succeed (a port that was taken meanwhile).
    """
    arguments = settings(os.environ)
    if arguments is None or jax.distributed.is_initialized():
        return
    # Where process 0 cannot be reached, JAX aborts: this line then says what it was about.
    if "process_id" in arguments:
        print(
            f"process {arguments['process_id']} of {arguments['num_processes']}, "
            f"coordinator {arguments['coordinator_address']}",
            file=sys.stderr,
            flush=True,
        )
    try:
        jax.distributed.initialize(
            **arguments, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, initialization_timeout=START_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"The processes of this run did not find each other: {error}") from error


def check_joined() -> None:
    """Raise UserError where JAX sees the chips of processes that this one has not joined. Starts JAX's back end."""
    # On a pod slice it does, from processes that cannot tell each other anything.
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"JAX sees {jax.process_count()} processes, but they have not joined each other: start ctpd on each of "
            "them with CTPD_DISTRIBUTED=detect in the environment, as launch/tpu_vm.sh does."
        )


def settings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what jax.distributed.initialize takes; {} where JAX detects it, None for a process that is alone.

    Raises:
      UserError: CTPD_COORDINATOR, CTPD_PROCESSES and CTPD_PROCESS do not belong together.
    """
    # 1. What launch/local.sh, or the user, says.
    given = {name: environment[name] for name in _NAMES if environment.get(name)}
    if given:
        return _explicit(given)
    detect = environment.get("CTPD_DISTRIBUTED", "")
    if detect not in ("", "detect"):
        raise UserError(f"CTPD_DISTRIBUTED={detect} in the environment: the only value is `detect`.")
    # 2. What the platform says.
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or ""
    several = (
        len([host for host in hosts.split(",") if host.strip()]) > 1
        or _number(environment.get("MEGASCALE_NUM_SLICES", "")) > 1
        # In `salloc` and in a batch script outside `srun` there are tasks too, but only this process was started.
        or (_number(tasks) > 1 and all(environment.get(name) for name in _SRUN))
    )
    return {} if detect or several else None


def _explicit(given: Mapping[str, str]) -> dict[str, Any]:
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise UserError(
            f"The environment has {' and '.join(given)}, but not {' and '.join(missing)}: several processes need all "
            "three, one process needs none."
        )
    count, number = _number(given["CTPD_PROCESSES"]), _number(given["CTPD_PROCESS"])
    if count < 1 or not 0 <= number < count:
        raise UserError(
            f"CTPD_PROCESS={given['CTPD_PROCESS']} of CTPD_PROCESSES={given['CTPD_PROCESSES']}: the processes are "
            "numbered from 0."
        )
    host, _, port = given["CTPD_COORDINATOR"].rpartition(":")
    if not host or not 0 < _number(port) < 65536:
        raise UserError(f"CTPD_COORDINATOR={given['CTPD_COORDINATOR']} must be HOST:PORT, where process 0 answers.")
    return {"coordinator_address": given["CTPD_COORDINATOR"], "num_processes": count, "process_id": number}


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _leave_together(seconds: int, code: int) -> None:
    """Wait until all have come here, then end what JAX keeps between the processes."""
    # JAX itself would wait at its own end for 5 minutes and then abort every process, also the one that still writes.
    if not jax.distributed.is_initialized():
        return
    # There is no public barrier with a time limit.
    try:
        client().wait_at_barrier("ctpd: the end", seconds * 1000)
    except RuntimeError as error:
        print(f"Not every process came to the end: {str(error).splitlines()[0]}", file=sys.stderr)
        atexit.register(_exit_now, code)
        return
    jax.distributed.shutdown()


def _exit_code(error: BaseException) -> int:
    """Return what cli.py, or Python, answers with."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _exit_now(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
