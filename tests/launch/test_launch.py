"""The launchers of platforms that are not here: their dry runs, manifests and notebook, read as text."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

LAUNCH = ROOT / "launch"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def dry_run(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The commands that a script would run, as words."""
    done = subprocess.run(
        ["bash", str(LAUNCH / script), "--dry-run", *arguments],
        capture_output=True, text=True, env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    undo = 'while IFS= read -r line; do eval "words=($line)"; printf "%s\\0" "${words[@]}"; printf "\\1"; done'
    words = subprocess.run(["bash", "-c", undo], input=done.stdout, capture_output=True, text=True, check=True).stdout
    return [command.split("\0")[:-1] for command in words.split("\1")[:-1]]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_bash_can_read_it(script):
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert os.access(LAUNCH / script, os.X_OK)


def test_nothing_names_a_machine():
    for path in LAUNCH.iterdir():
        found = re.findall(r"/(?:home|root|Users|work|tmp/w)/\S*", path.read_text())
        assert not found, f"{path.name}: {found}"


# ------------------------------------------------------------------------------------------------ this machine


def test_local_shows_one_command_a_process():
    first, second = dry_run("local.sh", "2", "run", "--workdir", "a b", CTPD="ctpd")
    assert first[-4:] == second[-4:] == ["ctpd", "run", "--workdir", "a b"]
    assert "CTPD_PROCESS=0" in first and "CTPD_PROCESS=1" in second
    assert [word for word in first if word.startswith("CTPD_COORD")] == [
        word for word in second if word.startswith("CTPD_COORD")
    ]


# ------------------------------------------------------------------------------------------------ TPU VMs


def test_tpu_vm_asks_for_a_queued_resource():
    (command,) = dry_run(
        "tpu_vm.sh", "create", NAME="mine", ZONE="z", PROJECT="p", SPOT="yes", ACCELERATOR="v5litepod-8"
    )
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mine"]
    assert {"--zone=z", "--project=p", "--node-id=mine", "--spot", "--accelerator-type=v5litepod-8"} <= set(command)
    assert "--spot" not in dry_run("tpu_vm.sh", "create")[0]


def test_tpu_vm_runs_on_all_workers_and_lets_them_find_each_other():
    (command,) = dry_run("tpu_vm.sh", "run", "run", "--config", "c.py", "--workdir", "/mnt/ctpd/a b")
    assert "--worker=all" in command
    remote = shlex.split(command[-1].removeprefix("--command="))
    assert "CTPD_DISTRIBUTED=detect" in remote and "KillMode=mixed" in remote
    assert remote[-7:] == ["launch/local.sh", "1", "run", "--config", "c.py", "--workdir", "/mnt/ctpd/a b"]


def test_tpu_vm_installs_on_all_workers_what_this_folder_holds():
    tar, copy, install, mount = dry_run("tpu_vm.sh", "install", SHARE="10.0.0.2:/ctpd")
    for name in tar[3:]:
        assert (LAUNCH.parent / name).exists(), name
    assert all("--worker=all" in command for command in (copy, install, mount))
    assert "-e 'ctpd[tpu,hub]'" in install[-1]
    assert "mount -t nfs -o hard,lookupcache=positive 10.0.0.2:/ctpd /mnt/ctpd" in mount[-1]
    assert len(dry_run("tpu_vm.sh", "install")) == 3  # no share, no mount


def test_tpu_vm_resumes_from_nothing():
    commands = dry_run("tpu_vm.sh", "resume", "run", "--workdir", "/mnt/ctpd/x")
    verbs = [command[4] if command[0] == "gcloud" else command[0] for command in commands]
    assert verbs == ["delete", "create", "describe", "tar", "scp", "ssh", "ssh"]


@pytest.mark.parametrize("arguments", [["run"], ["resume"], ["begin"], [], ["--wet-run", "create"]])
def test_tpu_vm_refuses_in_a_sentence(arguments):
    done = subprocess.run(["bash", str(LAUNCH / "tpu_vm.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("tpu_vm.sh: ")


# ------------------------------------------------------------------------------------------------ Slurm


def slurm(tmp_path: Path, code: int, restarts: int) -> tuple[int, str]:
    """The job's exit code and what it called, with programs of our own in the place of Slurm's."""
    for name, end in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"{tmp_path}/calls"\nexit {end}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "VENV": "v", "RESTARTS": "2"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), "run", "--workdir", "w"],
        capture_output=True, text=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment,
    )  # fmt: skip
    return done.returncode, (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    "code, restarts, answer, again",
    [(0, 0, 0, False), (2, 0, 2, False), (75, 9, 0, True), (143, 9, 0, True), (134, 1, 0, True), (134, 2, 134, False),
     (137, 2, 137, False)],
)  # fmt: skip
def test_slurm_queues_the_job_again_where_that_helps(tmp_path, code, restarts, answer, again):
    ended, calls = slurm(tmp_path, code, restarts)
    assert ended == answer
    assert "srun --kill-on-bad-exit=0 --wait=120 --label v/bin/ctpd run --workdir w\n" in calls
    assert ("scontrol requeue 7\n" in calls) == again


def test_slurm_options_stand_before_the_first_command():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines[:first] if line.startswith("#SBATCH")]
    assert [line for line in lines if line.startswith("#SBATCH")] == options
    assert "#SBATCH --signal=TERM@120" in options and "#SBATCH --requeue" in options
    assert options == [line for line in dry_text("slurm.sh", "run") if line.startswith("#SBATCH")]


def dry_text(script: str, *arguments: str) -> list[str]:
    command = ["bash", str(LAUNCH / script), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


# ------------------------------------------------------------------------------------------------ GKE


def test_jobset_starts_all_again_and_counts_only_crashes():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = spec["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    exits, disruption = job["podFailurePolicy"]["rules"]
    assert 75 in exits["onExitCodes"]["values"] and 137 not in exits["onExitCodes"]["values"]
    assert exits["onExitCodes"]["containerName"] == container["name"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]

    chips, topology = container["resources"]["limits"], pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert job["parallelism"] == job["completions"] == rows * columns // chips["google.com/tpu"]
    assert chips == container["resources"]["requests"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_image_holds_what_the_install_needs():
    for words in map(str.split, (LAUNCH / "Dockerfile").read_text().splitlines()):
        if words and words[0] == "COPY":
            for name in words[1:-1]:
                assert (LAUNCH.parent / name).exists(), name


# ------------------------------------------------------------------------------------------------ Colab


def test_the_notebook_is_clean_and_its_python_parses():
    notebook = json.loads((LAUNCH / "colab.ipynb").read_text())
    assert notebook["nbformat"] == 4 and notebook["metadata"]["accelerator"] == "TPU"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        lines = ["pass" if line.startswith(("!", "%")) else line for line in "".join(cell["source"]).splitlines()]
        ast.parse("\n".join(lines))
    text = "".join(line for cell in cells for line in cell["source"])
    assert "configs/colab_v5e.py" in text and "launch/local.sh 1 run" in text


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("local.sh", ("2", "run", "--workdir", "x")), ("tpu_vm.sh", ("create",)), ("slurm.sh", ("run", "--workdir", "x"))],
)
def test_a_dry_run_is_one_wherever_it_stands(script, arguments):
    last = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments, "--dry-run"],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PATH": "/usr/bin:/bin", "CTPD": "false"},
    )  # fmt: skip
    assert last.returncode == 0 and "--dry-run" not in last.stdout and last.stdout.strip()


def test_every_script_has_help():
    for script in ("local.sh", "tpu_vm.sh", "slurm.sh"):
        done = subprocess.run(["bash", str(LAUNCH / script), "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Environment" in done.stdout and "#SBATCH" not in done.stdout
