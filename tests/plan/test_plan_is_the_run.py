"""What `ctpd plan` lists is what a run compiles: program for program, on the shapes of the run's own batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import MICRO

from ctpd_jax.cli import load_config, main
from ctpd_jax.data.rows import BatchShape
from ctpd_jax.job.recipe import Reading
from ctpd_jax.job.table import STUDENTS, TRAINED, left_out
from ctpd_jax.plan.programs import decoders, plan_stage
from ctpd_jax.sharding import make_mesh
from ctpd_jax.train.loop import Recipe

# The other students run programs of these stages, or are not planned.
RUN = [stage for stage in TRAINED if stage in ("student_dpo", "train") or stage not in STUDENTS]
SHORT = [f"--config.{stage}.steps=1" for stage in RUN]
ADAPTERS = [f"--config.{stage}.lora.rank=4" for stage in ("teacher_sft", "positive", "negative", "train")]
HALF = [f"--config.{stage}.lora.base=bfloat16" for stage in ("teacher_sft", "positive", "negative", "train")]
MIXED = ["--config.train.objective=mixed", "--config.train.margin_as=weight", "--config.student_dpo.steps=-1"]
CASES = {
    "plain": [],
    "one teacher, mixed": [*MIXED, "--config.weights.source=dpo_reference"],
    "packed": ["--config.rows.packed=yes", "--config.rows.layout=response"],
    "adapters": [*ADAPTERS, "--config.student_dpo.steps=-1"],
    "adapters, bfloat16, packed": [*ADAPTERS, *HALF, "--config.annotate.teacher_weights=bfloat16",
                                   "--config.rows.packed=yes", "--config.student_dpo.steps=-1"],
}  # fmt: skip
pytestmark = pytest.mark.slow


class Spy:
    """A jitted program that remembers what it was called with: the text of its jaxpr, types and all."""

    def __init__(self, program: Any, found: dict[str, BatchShape]) -> None:
        self.program, self.found = program, found

    def __call__(self, *args: Any) -> Any:
        batches = [arg for arg in args if hasattr(arg, "target")]
        shape = BatchShape(*batches[0].tokens.shape, batches[0].target.shape[1]) if batches else None
        self.found[str(self.program.trace(*args).jaxpr)] = shape
        return self.program(*args)

    def _cache_size(self) -> int:
        return self.program._cache_size()


@pytest.mark.parametrize("case", CASES)
def test_the_plan_lists_the_programs_that_a_run_compiles(tmp_path, monkeypatch, case):
    training: dict[str, dict[str, BatchShape]] = {}
    reading: dict[str, BatchShape] = {}
    programs, program = Recipe.programs, Reading.program
    monkeypatch.setattr(
        Recipe,
        "programs",
        lambda self: tuple(Spy(one, training.setdefault(self.stage, {})) for one in programs(self)),
    )
    monkeypatch.setattr(Reading, "program", lambda self: Spy(program(self), reading))

    rows = map(json.loads, Path(load_config(MICRO, []).data.train).read_text().splitlines())
    data = tmp_path / "with_margins.jsonl"  # of which some cases make a field of the batch
    data.write_text("".join(json.dumps(row | {"margin": 0.5}) + "\n" for row in rows))
    settings = [*SHORT, *CASES[case], f"--config.data.train={data}"]
    arguments = ["--config", MICRO, "--workdir", str(tmp_path / "run"), *settings]
    for command in (["sft"], ["dpo"], ["dpo", "--reverse"], ["annotate"], ["dpo", "--student"], ["train"]):
        assert main([*command, *arguments]) == 0
    monkeypatch.undo()

    config = load_config(MICRO, settings)
    mesh = make_mesh(config.mesh)

    def planned(stage: str, shapes: set[BatchShape]) -> dict[str, set[str]]:
        """Name of a program -> what it is on each of the shapes."""
        found: dict[str, set[str]] = {}
        for shape in shapes:
            for one in plan_stage(config, stage, decoders(config, stage), mesh, shape, platform="cpu").programs:
                found.setdefault(one.name, set()).add(str(one.traced.jaxpr))
        return found

    stages = [stage for stage in TRAINED if not left_out(config, stage)]
    assert list(training) == stages
    for stage, found in training.items():
        expected = planned(stage, {shape for shape in found.values() if shape})
        assert set(found) == set().union(*expected.values()), stage
    # Teacher and student read in rows of their own shapes: each planned program ran on some, and no other one ran.
    expected = planned("annotate", set(reading.values()))
    assert set(reading) <= set().union(*expected.values())
    assert all(texts & set(reading) for texts in expected.values())
