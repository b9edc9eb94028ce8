"""One command at work: its config, its folder, its devices, and what finished stages say of themselves."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctpd_jax.artifacts import read_record, write_record
from ctpd_jax.errors import UserError, without_secrets
from ctpd_jax.job.held import Held
from ctpd_jax.job.table import STAGES
from ctpd_jax.processes import distributed, preempt, stall
from ctpd_jax.sharding import first_process, make_mesh, patiently, told_by_first
from ctpd_jax.train.metrics import MetricLog

# Of the devices of one process: a model that only reads is divided among them.
OWN_MESH = {"data": 1, "fsdp": -1, "tensor": 1}


@dataclass(frozen=True, eq=False)
class Job:
    """Where a command works. It knows no model and no data: job/models.py and job/pairs.py are asked for those."""

    config: ConfigDict
    workdir: Path
    log: MetricLog
    say: Callable[[str], None]
    mesh: Mesh  # all devices
    own: Mesh  # the devices of this process, for work that is divided among processes or done by one of them
    held: Held  # parameters that its stages hand on
    looks_only: bool = False  # it leaves the workdir as it is, where another command may be at work

    def note(self, name: str, value: Any) -> None:
        """Write a record of the workdir, once for all processes; who only looks does without where he may not."""
        # A folder that is read-only is no reason not to look at it.
        if first_process():
            with suppress(OSError) if self.looks_only else nullcontext():
                write_record(self.workdir / name, value)


@contextmanager
def open_job(
    config: ConfigDict, workdir: Path, say: Callable[[str], None] = print, looks_only: bool = False
) -> Iterator[Job]:
    """Makes the folder, the mesh and the log of a command.

    Raises:
        UserError: the platform is not the one that was asked for, the folder or the mesh cannot be made, or another
            command is at work in the folder, unless this one only looks at what is there.
    """
    # Before anything is written: the devices that were asked for, and processes that know of each other.
    check_platform(config)
    distributed.check_joined()
    workdir = Path(workdir).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be made: {error.strerror}.") from error
    stall.allow(config.stall_minutes)
    if config.compile_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX's own setting goes first
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    with (
        nullcontext() if looks_only else alone_in(workdir),
        MetricLog(workdir, first_process() and not looks_only, wandb=config.wandb, config=told(config)) as log,
    ):
        told_once = say if first_process() else lambda text: None
        job = Job(
            config,
            workdir,
            log,
            told_once,
            *meshes(config),
            Held(0.0 if looks_only else config.models_in_memory),
            looks_only,
        )
        job.say(f"JAX {jax.__version__} on {', '.join(str(device) for device in jax.devices())}; {workdir}")
        if job.mesh.devices.size > 1:
            job.say("mesh: " + ", ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items()))
        try:
            yield job
        finally:
            job.held.clear()  # caches know the job for longer


def told(config: ConfigDict) -> dict[str, Any]:
    """The settings as they are written down: without the name and the password that an address may hold."""
    found: dict[str, Any] = json.loads(without_secrets(json.dumps(config.to_dict())))
    return found


@contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Refuses a folder in which another command is at work. The lock goes with its process, however that ends."""

    def lock() -> None:
        try:
            for again in (True, True, False):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not again:
                        raise
                    time.sleep(0.1)  # `ctpd status` tries the lock, for a moment
        except BlockingIOError as error:
            raise UserError(
                f"Another command is at work in {workdir}, process {file.read().strip() or 'unknown'}: two would spoil "
                "each other's files. Wait for it, stop it, or give another --workdir."
            ) from error
        except OSError:
            return  # a file system without locks
        file.truncate()
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()

    with open(workdir / "lock", "a+", encoding="utf-8") as file:
        file.seek(0)
        told_by_first(lock)
        yield


def meshes(config: ConfigDict) -> tuple[Mesh, Mesh]:
    """The mesh of all devices, and that of this process's own, which share every parameter among them."""
    mesh = make_mesh(config.mesh)
    if jax.process_count() == 1:
        return mesh, mesh
    return mesh, make_mesh(OWN_MESH, jax.local_devices())


def check_platform(config: ConfigDict) -> None:
    """Refuses to fall back to the CPU silently, as JAX does where an accelerator is there but busy."""
    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        raise UserError(
            f"JAX cannot start: {str(error).splitlines()[0]} (config.platform = {config.platform!r})"
        ) from error
    if config.platform not in ("auto", backend):
        raise UserError(f"config.platform asks for {config.platform}, JAX found {backend}.")
    # Device files tell of an accelerator that JAX could not open.
    seen = importlib.util.find_spec("libtpu") is not None and any(
        os.path.exists(device) for device in ("/dev/accel0", "/dev/vfio/0")
    )
    seen = seen or os.path.exists("/dev/nvidia0")
    if backend == "cpu" and seen and config.platform == "auto" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        raise UserError(
            "This machine has an accelerator, but JAX found only the CPU: it is busy, or jax was installed without it. "
            "Set --config.platform=cpu to go on without."
        )


def by_first(what: str, work: Callable[[], object]) -> None:
    """Has the first process do what is done once; the others wait, and where it was stopped all of them stop."""
    with preempt.apart(what):
        if first_process():
            work()


# ------------------------------------------------------------------------------------------------ finished stages


def result(job: Job, stage: str) -> dict[str, Any] | None:
    """What a finished stage says of itself; None before it is finished."""
    return read_record(job.workdir / stage / "done.json")


def require(job: Job, stage: str) -> dict[str, Any]:
    """The stage's result.

    Raises:
        UserError: it is not finished; names the command that does it.
    """
    found = patiently(lambda: result(job, stage))
    if found is None:
        command = STAGES[stage].command
        raise UserError(f"{job.workdir / stage} is not finished; run `{command}` or `ctpd run` first.")
    return found
