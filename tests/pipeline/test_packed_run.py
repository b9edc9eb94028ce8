"""A run whose rows are packed: the numbers of one that has a row for each, no more programs than planned."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MICRO

from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import main
from ctpd_jax.schema import SIDES
from ctpd_jax.train.loop import compiled_programs
from ctpd_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow  # a chain of stages of its own

OVERRIDES = [
    "--config.rows.layout=response", "--config.rows.buckets=2", "--config.rows.multiple=16",
    "--config.train.micro_batch=3", "--config.annotate.micro_batch=5",
    "--config.teacher_sft.steps=-1", "--config.weights.source=uniform", "--config.student.remat=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(new_workdir) -> dict[str, Path]:
    folders = {packed: new_workdir(f"packed_{packed}") for packed in ("yes", "no")}
    for packed, folder in folders.items():
        for command in ("sft", "annotate", "train"):
            settings = ["--config", MICRO, "--workdir", str(folder), *OVERRIDES, f"--config.rows.packed={packed}"]
            assert main([command, *settings]) == 0
    return folders


def test_packed_training_is_the_same_training(runs):
    for stage in ("student_sft", "train"):
        packed, alone = (read_metrics(runs[name], stage) for name in ("yes", "no"))
        assert len(packed) == len(alone) == 4
        for one, other in zip(packed, alone):
            for name in ("loss", "grad_norm", "num_tokens", "num_scored_tokens"):
                assert one[name] == pytest.approx(other[name], rel=1e-3), (stage, one["step"], name)
        assert np.mean([line["padding"] for line in packed]) < np.mean([line["padding"] for line in alone])


def test_packed_annotation_is_the_same_annotation(runs):
    packed, alone = (open_store(runs[name] / "annotations", verify=False) for name in ("yes", "no"))
    assert len(packed) == len(alone)
    for i in range(len(packed)):
        for side in SIDES:
            for name, values in packed[i][1][side].items():
                np.testing.assert_allclose(values, alone[i][1][side][name], atol=2e-3)


def test_nothing_is_compiled_after_the_planned_shapes(runs):
    for folder in runs.values():
        lines = [line for line in read_metrics(folder) if "compiled_programs" in line]
        stages = {line["stage"] for line in lines}
        assert stages == {"student_sft", "train", "annotations/reference", "annotations/start"}
        assert {line["compiled_programs"] for line in lines} == {1, 2}
        for stage in stages:
            counts = [line["compiled_programs"] for line in lines if line["stage"] == stage]
            assert counts == sorted(counts)


def test_a_program_too_many_stops_the_stage():
    double = jax.jit(lambda x: 2 * x)
    assert compiled_programs("train", double, 1) == 0
    for length in (1, 2, 2):
        double(jnp.ones(length))
    assert compiled_programs("train", double, 2) == 2
    double(jnp.ones(2, jnp.int32))
    message = re.escape("train: 3 programs were compiled for batches of 2 planned shapes")
    with pytest.raises(RuntimeError, match=message):
        compiled_programs("train", double, 2)
