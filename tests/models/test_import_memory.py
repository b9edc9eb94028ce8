"""The import of 2 billion parameters, measured as benchmarks/import_memory.py does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "import_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process stands in Linux's /proc")
def test_two_billion_parameters_come_in_without_a_second_copy(tmp_path):
    """Writing and reading 4.1 GB: about half a minute."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, BENCHMARK, "--json", tmp_path / "found.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["size"] > 4e9 and found["files"] > 1
    assert found["peak"] <= found["size"] + 1.5e9
    # Stricter: no parameter is on the host twice, not even the largest one, of 0.84 GB.
    assert found["peak"] <= found["size"] + found["before"] + 0.4e9
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]  # 4 GB are not left lying about
