"""Runs mesh_checks.py on eight simulated devices, in a process of its own: twenty updates on every mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FIRST, LATER = 2e-6, 1e-4  # relative to the loss on one device: of the first update, and of any of the twenty


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "models"), os.environ.get("PYTHONPATH", "")]),
    }
    script = Path(__file__).with_name("mesh_checks.py")
    command = [sys.executable, script, str(tmp_path_factory.mktemp("meshes"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["llama", "gemma3", "lora"])
def test_every_mesh_trains_as_one_device_does(found, model):
    one = np.array(found[f"{model} 1"]["loss"])
    others = {name: run for name, run in found.items() if name.startswith(model) and not name.endswith(" 1")}
    assert len(others) == (1 if model == "lora" else 3)
    for name, run in others.items():
        gaps = np.abs(np.array(run["loss"]) - one) / np.abs(one)
        print(f"{name}: relative gap {gaps[0]:.1e} at the first update, {gaps.max():.1e} at most")
        assert len(gaps) == 20 and gaps[0] <= FIRST and gaps.max() <= LATER, name
    assert one[-1] < 0.9 * one[0] or model == "lora"  # something was learned meanwhile


def test_the_same_mesh_repeats_bit_for_bit(found):
    assert found["again 2x2x2"] == found["llama 2x2x2"]
    assert found["llama 8 fsdp"]["digest"] != found["llama 1"]["digest"]  # the digest sees rounding


def test_parameters_are_really_spread(found):
    shares = {name: run["share"] for name, run in found.items()}
    assert shares["llama 1"] == shares["llama 8 data"] == 1
    assert shares["llama 8 fsdp"] == 1 / 8 and shares["llama 2x2x2"] == 1 / 4


def test_nothing_is_compiled_twice(found):
    assert all(run["programs"] <= run["shapes"] for run in found.values())
