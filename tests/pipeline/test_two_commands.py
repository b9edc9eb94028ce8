"""Two commands in one workdir: the second one refuses; a process that was killed holds nothing."""

import os
import subprocess
import sys

import pytest
from helpers import MICRO

from ctpd_jax.cli import load_config
from ctpd_jax.errors import UserError
from ctpd_jax.job.job import alone_in, open_job

HOLDS = """
import sys, time
from pathlib import Path
from ctpd_jax.job.job import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_command_refuses_until_the_first_is_gone(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"at work in .*, process {first.pid} on"), alone_in(tmp_path):
            pass
        config = load_config(str(MICRO), [])
        with pytest.raises(UserError, match="another --workdir"), open_job(config, tmp_path):
            pass
        with open_job(config, tmp_path, looks_only=True):  # who looks, as `ctpd inspect` does, is in nobody's way
            pass
    finally:
        first.kill()
        first.wait()
    with alone_in(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(str(os.getpid()))


def test_who_looks_leaves_the_metrics_alone(tmp_path):
    """A line that a run is just writing must not be taken for one that a kill has torn."""
    (tmp_path / "metrics.jsonl").write_text('{"stage": "train", "step": 0, "time": 1.0}\n{"stage": "tra')
    config = load_config(str(MICRO), [])
    config.wandb = "a project"  # nobody is told of a look
    with open_job(config, tmp_path, looks_only=True):
        pass
    assert (tmp_path / "metrics.jsonl").read_text().endswith('{"stage": "tra')
