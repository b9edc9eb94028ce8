"""Twenty updates on every mesh of eight simulated devices."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.eight_devices import run_on_eight_devices

pytestmark = pytest.mark.slow
FIRST, LATER = 2e-6, 1e-4  # relative to the loss on one device: of the first update, and of any of the twenty


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    printed = run_on_eight_devices("mesh_checks", tmp_path_factory.mktemp("meshes"), quick=False)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("model", ["llama", "gemma3", "lora", "beyond"])
def test_every_mesh_trains_as_one_device_does(found, model):
    one = np.array(found[f"{model} 1"]["loss"])
    others = {name: run for name, run in found.items() if name.startswith(model) and not name.endswith(" 1")}
    assert len(others) == (1 if model in ("lora", "beyond") else 3)
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
