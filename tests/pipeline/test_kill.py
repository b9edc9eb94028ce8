"""kill -9 in the middle of every stage, then the same command again: bit-identical to an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import MICRO

# Every stage has work left when it is killed: shards of annotation and evaluation, a checkpoint half-way in training.
COMMAND = [
    sys.executable, "-m", "ctpd_jax.cli", "run", "--config", MICRO, "--config.annotate.pairs_per_shard=8",
    "--config.student_proposed.steps=4",
]  # fmt: skip


def half_trained(*stages: str) -> dict[str, Callable[[Path], bool]]:
    return {
        stage: lambda workdir, stage=stage: (workdir / stage / "checkpoints/00000002/checksums.json").exists()
        for stage in stages
    }


# In the order of the run: what is there already would be killed as soon as it starts.
STAGES: dict[str, Callable[[Path], bool]] = {
    **half_trained("teacher_sft", "student_sft", "positive", "negative"),
    "annotate, a column": lambda workdir: len(list(workdir.glob("annotations/columns/positive/0*"))) >= 2,
    "annotate, the store": lambda workdir: any(workdir.glob("annotations/*.array_record-00001*")),
    "propose, the answers": lambda workdir: (workdir / "proposals/answers/00001.json").exists(),
    "propose, the ranking": lambda workdir: any(workdir.glob("proposals/ranking/columns/positive/0*")),
    "propose, the store": lambda workdir: any(workdir.glob("proposals/columns/start/0*")),
    **half_trained("student_dpo", "train", "student_proposed"),
    "evaluate": lambda workdir: any(workdir.glob("evaluation/columns/ctpd/0*")),
    "evaluate, samples": lambda workdir: any(workdir.glob("evaluation/samples/ctpd.json*")),
    "export": lambda workdir: (workdir / "evaluation.json").exists(),
}


def start(workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--workdir", str(workdir)],
        stdout=open(workdir.with_suffix(".log"), "ab"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""},
    )


def run_to_the_end(workdir: Path) -> None:
    process = start(workdir)
    assert process.wait(600) == 0, workdir.with_suffix(".log").read_text()[-3000:]


def digests(workdir: Path) -> dict[str, str]:
    stages = ("teacher_sft", "student_sft", "positive", "negative", "student_dpo", "train", "student_proposed")
    return {stage: json.loads((workdir / stage / "done.json").read_text())["params"] for stage in stages}


def export_bytes(workdir: Path) -> bytes:
    return (workdir / "export" / "model.safetensors").read_bytes()


def told(workdir: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines]


def kill_when(workdir: Path, ready: Callable[[Path], bool]) -> bool:
    """Starts the run and kills it as soon as `ready`; False where the run was faster."""
    process = start(workdir)
    try:
        while not ready(workdir):
            if process.poll() is not None:
                return False
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    finally:
        if process.poll() is None:
            process.kill()


@pytest.mark.slow
def test_killed_in_every_stage(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    run_to_the_end(whole)
    shutil.copytree(whole / "compile_cache", killed / "compile_cache")  # the same programs, compiled once
    for stage, ready in STAGES.items():
        assert kill_when(killed, ready), f"the run ended before it could be killed in {stage}"
    run_to_the_end(killed)
    assert digests(killed) == digests(whole)
    assert export_bytes(killed) == export_bytes(whole)
    leftovers = [path for path in killed.rglob("*") if path.name.endswith((".partial", ".new", ".tmp"))]
    assert not leftovers
    steps = told(killed)
    assert len(steps) == len(set(steps)) and set(steps) == set(told(whole))  # each update and each shard told once
