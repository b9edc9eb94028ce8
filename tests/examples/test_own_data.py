"""The commands of the shell script are commands of `ctpd`; what they do is tested in tests/pipeline."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from ctpd_jax.cli import load_config, parser

SCRIPT = Path(__file__).parents[2] / "examples" / "own_data.sh"


def test_every_command_is_understood(tmp_path):
    """A stand-in for `ctpd` writes down what it was asked; spaces in names have to survive."""
    stand_in = tmp_path / "bin" / "ctpd"
    stand_in.parent.mkdir()
    asked_file = tmp_path / "asked"
    stand_in.write_text('#!/usr/bin/env bash\n{ printf "%q " "$@"; echo; } >> "$ASKED"\n')
    stand_in.chmod(0o755)
    arguments = ["a teacher", "student", "train.jsonl", "test.jsonl", str(tmp_path / "run"), "--config.data.limit=64"]
    environment = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "ASKED": str(asked_file)}
    subprocess.run([SCRIPT, *arguments], check=True, env=environment, timeout=60)
    asked = [shlex.split(line) for line in asked_file.read_text().splitlines()]
    for words in asked:
        known, overrides = parser().parse_known_args(words)
        if known.config:
            config = load_config(known.config, overrides)
            assert (config.teacher.path, config.data.limit) == ("a teacher", 64)
    commands = [words[0] for words in asked]
    assert commands == [
        "inspect",
        "sft",
        "dpo",
        "dpo",
        "annotate",
        "inspect",
        "train",
        "evaluate",
        "export",
        "generate",
    ]


def test_without_arguments_it_says_how():
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "train.jsonl" in done.stdout and "set -euo" not in done.stdout
