"""benchmarks/quality.py: its statistics by hand, and a cell that gives the same numbers again."""

import importlib
import json
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest

from ctpd_jax.errors import UserError

CTPD = {"ctpd": (0.3, 2e-3)}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = "pairs=48,test_pairs=16,batch=8,sft_updates=4,updates=3,samples=8,max_new_tokens=16"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality_report

    return quality_report


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_imports_what_there_is(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module(name)


def test_an_interval_is_students(report):
    mean, half = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776445 * 2.5**0.5 / 5**0.5, rel=1e-6)  # t of 4 degrees of freedom
    assert report.interval([2.0])[0] == 2 and np.isnan(report.interval([2.0])[1]) and np.isnan(report.interval([])[0])


def test_differences_are_taken_seed_by_seed(report):
    """What the seeds have in common cancels: a gain of 0.1 in every world is sure, however the worlds differ."""
    base, worlds = {0: -3.0, 1: 0.0, 2: 5.0}, "nominal"
    found = {
        (worlds, "ctpd"): {seed: {"reward": value, "accuracy": 0.5} for seed, value in base.items()},
        (worlds, "ours"): {seed: {"reward": value + 0.1, "accuracy": 0.75} for seed, value in base.items() if seed},
    }
    assert report.paired(found, worlds, "ours", "reward") == pytest.approx([0.1, 0.1])
    text = report.outcome_table(found, worlds, {"ctpd": "the paper's", "ours": "better"})
    assert "| `ours` | better | 2 | 2.60 ± 31.77 | +0.10 ± 0.00 | 75.0 ± 0.0 | +25.0 ± 0.0 |" in text


def test_a_report_has_its_tables_and_figures(report, tmp_path):
    found = {
        (world, method): {seed: {"reward": seed + shift, "accuracy": 0.6} for seed in range(3)}
        for world, shift in (("a", 0.0), ("b", 1.0))
        for method in ("ctpd", "dpo")
    }
    says, kinds = {"dpo": "DPO", "ctpd": "CTPD"}, {"nominal": {"a": "-"}, "noise": {"a": "0", "b": "0.1"}}
    text = report.report(tmp_path, found, {"dpo": (0.1, 1e-3), "ctpd": (0.3, 2e-3)}, says, kinds)
    assert "| `ctpd` | 0.3 | 0.002 |" in text
    svg = xml.dom.minidom.parse(str(tmp_path / "noise-reward.svg"))
    assert len(svg.getElementsByTagName("circle")) == 4 and len(svg.getElementsByTagName("polyline")) == 2
    at_ctpd = report.fluent_table(
        {key: found[key] for key in found if key[0] == "a"}, "a", {"dpo": (0.2, 1e-3)} | CTPD, says
    )
    assert at_ctpd.count("| `dpo` |") == 2 and "| `dpo` | 0.2 | 0.001 |" in at_ctpd


def test_the_frontier_has_a_point_for_every_setting(report):
    points = {"ctpd": [(0.7, 2.0), (0.6, 1.0)], "dpo": [(0.65, 0.5)], "sft": []}
    svg = xml.dom.minidom.parseString(report.frontier(points))
    places = [(float(c.getAttribute("cx")), float(c.getAttribute("cy"))) for c in svg.getElementsByTagName("circle")]
    assert (
        len(places) == 3 and places[0][0] < places[2][0] < places[1][0] and places[1][1] < places[0][1] < places[2][1]
    )


def test_settings_are_given_chosen_or_another_methods(report):
    import quality

    grid = [
        {"key": {"world": f"seed{seed}-noise0.2-word-teacher1", "method": "ctpd", "knob": knob, "lr": 1e-3}}
        | {"found": {"reward": knob, "bits_per_byte": 1 + knob}}
        for seed in quality.CHOOSING_SEEDS
        for knob in (0.1, 0.3)
    ]
    names = ["sft", "ctpd", "random", "dpo", "tis"]
    # An ablation takes what was chosen for CTPD, TIS-DPO what was for DPO; who was not tried has nothing.
    assert quality.chosen_settings(grid, names, {}) == {"sft": (0, 0), "ctpd": (0.3, 1e-3), "random": (0.3, 1e-3)}
    given = quality.given_settings("ctpd=0.1:0.002,dpo=1:0.001")
    own = {"sft": (0, 0), "ctpd": (0.1, 2e-3), "random": (0.1, 2e-3), "dpo": (1, 1e-3), "tis": (1, 1e-3)}
    assert quality.chosen_settings(grid, names, given) == own
    assert not quality.choosing_cells(names, given)
    assert {cell.method for cell in quality.choosing_cells(names, {})} == {"ctpd", "dpo"}
    with pytest.raises(UserError, match="METHOD=KNOB:LR"):
        quality.given_settings("ctpd=0.1")


@pytest.mark.slow
def test_a_cell_run_again_gives_the_same_numbers(tmp_path):
    cell = "world=seed3-noise0.2-near-teacher0.5,method=ctpd,beta=0.3,lr=0.002"
    command = [sys.executable, BENCHMARKS / "quality.py", "--dir", tmp_path, "--sizes", TINY, "--one", cell]
    for again in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("the same numbers" in done.stdout.splitlines()) == again
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["found"] for line in lines)
    assert first["reward"] == second["reward"] and first["bits_per_byte"] == second["bits_per_byte"] > 0
    # A line that a killed process has torn is no line, and does not spoil the next one.
    with open(tmp_path / "cells.jsonl", "a") as file:
        file.write('{"key": {"wor')
    done = subprocess.run([*command[:-2], "--report"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
