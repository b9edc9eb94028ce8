"""What the environment says about other processes, and how processes leave."""

import os
import socket
import subprocess
import sys

import pytest
from helpers import MICRO

from ctpd_jax import cli
from ctpd_jax.errors import UserError
from ctpd_jax.processes.distributed import check_joined, settings

EXPLICIT = {"CTPD_COORDINATOR": "host:1234", "CTPD_PROCESSES": "2", "CTPD_PROCESS": "1"}
SRUN = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (EXPLICIT, {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}),
        (EXPLICIT | SRUN, {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}),
        (dict.fromkeys(EXPLICIT, ""), None),
        ({"CTPD_DISTRIBUTED": "detect"}, {}),
        (SRUN, {}),
        (SRUN | {"SLURM_NTASKS": "1"}, None),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell inside an allocation of two
        ({name: SRUN[name] for name in SRUN if name != "SLURM_STEP_NODELIST"}, None),  # a batch script outside srun
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {}),
        ({"MEGASCALE_NUM_SLICES": "1"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, {}),
    ],
)
def test_what_the_environment_says(environment, expected):
    assert settings(environment) == expected


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"CTPD_PROCESS": ""}, "CTPD_COORDINATOR and CTPD_PROCESSES, but not CTPD_PROCESS"),
        ({"CTPD_PROCESS": "2"}, "CTPD_PROCESS=2 of CTPD_PROCESSES=2"),
        ({"CTPD_PROCESSES": "two"}, "CTPD_PROCESSES=two"),
        ({"CTPD_COORDINATOR": "host"}, "must be HOST:PORT"),
        ({"CTPD_COORDINATOR": "host:0"}, "must be HOST:PORT"),
    ],
)
def test_what_does_not_belong_together_is_a_sentence(wrong, said):
    with pytest.raises(UserError, match=said):
        settings(EXPLICIT | wrong)


def test_an_unknown_word_is_a_sentence():
    with pytest.raises(UserError, match="CTPD_DISTRIBUTED=yes"):
        settings({"CTPD_DISTRIBUTED": "yes"})


@pytest.mark.parametrize("joined", [False, True])
def test_processes_that_have_not_joined_are_refused(monkeypatch, joined):
    monkeypatch.setattr("jax.process_count", lambda: 2)  # as JAX counts on a pod slice, joined or not
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: joined)
    if joined:
        check_joined()
        return
    with pytest.raises(UserError, match=r"2 processes, but .* CTPD_DISTRIBUTED=detect"):
        check_joined()


def test_the_command_line_refuses_before_it_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert cli.main(["evaluate", "--config", MICRO, "--workdir", str(tmp_path / "run")]) == 2
    assert "CTPD_DISTRIBUTED=detect" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


LEAVE = """
import sys, time
import jax
from jax.experimental import multihost_utils
from ctpd_jax.processes import distributed, preempt
from ctpd_jax.errors import UserError

distributed.LAST_SAVE = 2
how = sys.argv[1]

@distributed.joined()
def command():
    number = jax.process_index()
    assert jax.process_count() == 2 and jax.device_count() == 4
    multihost_utils.sync_global_devices("begun")
    if how == "mend" and number == 1:
        raise UserError("mend this")
    if how == "late" and number == 0:
        time.sleep(3)  # writes alone, while the other waits
    if how == "one stops" and number == 0:
        time.sleep(5)
    if "stop" in how:
        raise preempt.Preempted("kept")
    if how == "mend":
        multihost_utils.sync_global_devices("never")

try:
    command()
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
except preempt.Preempted:
    sys.exit(preempt.EXIT_CODE)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, codes", [("late", [0, 0]), ("stop", [75, 75]), ("one stops", [75, 75]), ("mend", [None, 2])]
)
def test_each_leaves_with_its_own_exit_code(how, codes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVE, how], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {
                "CTPD_COORDINATOR": address, "CTPD_PROCESSES": "2", "CTPD_PROCESS": str(number), "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            },
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, code, text in zip(processes, codes, told):
        assert process.returncode == code if code is not None else process.returncode not in (0, 75), text
    if how == "mend":
        assert "mend this" in told[1]
