"""The faults themselves: they come where they should, once each, and leave what a kill or a full disk leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults.inject import kind

# Writes a file and renames it, makes a folder, and takes something away; what fails is told as a run would.
SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from faults.inject import install
work, points, fault = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
install(work, points, fault)
try:
    for number in range(2):
        (work / f"{number}.partial").write_text("x" * 100)
        os.replace(work / f"{number}.partial", work / f"{number}.txt")
    (work / "folder").mkdir(exist_ok=True)
    (work / "1.txt").unlink()
    (Path(sys.argv[3]).parent / "elsewhere").write_text("not counted")
except OSError as error:
    sys.exit(f"{error.errno} {os.path.basename(error.filename)}")
"""


def run(folder: Path, fault: str) -> subprocess.CompletedProcess:
    work = folder / "work"
    work.mkdir(exist_ok=True)
    tests = Path(__file__).resolve().parents[1]
    arguments = [str(tests), str(work), str(folder / "points"), fault]
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)


def test_every_point_is_killed_once_and_the_file_before_it_is_torn(tmp_path):
    torn = []
    for _ in range(4):
        assert run(tmp_path, "kill").returncode == -signal.SIGKILL
        torn += [(path.name, path.stat().st_size) for path in (tmp_path / "work").glob("*.partial")]
    assert run(tmp_path, "kill").returncode == 0
    points = (tmp_path / "points").read_text().splitlines()
    assert points == ["open #.partial", "rename #.txt", "mkdir folder", "remove #.txt"]
    assert torn == [("0.partial", 50)]  # before its rename; at the next kill it was whole and had its name
    assert (tmp_path / "work" / "0.txt").stat().st_size == 100


def test_a_full_disk_refuses_what_needs_room_and_everything_after_it(tmp_path):
    assert [run(tmp_path, "full").stderr.strip() for _ in range(2)] == ["28 0.partial", "28 folder"]
    assert run(tmp_path, "full").returncode == 0
    assert (tmp_path / "points").read_text().splitlines() == ["open #.partial", "mkdir folder"]


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("teacher_sft/params/d/0", "STAGE/params/d/#"),
        ("annotations/columns/positive/00001.f32.partial", "annotations/columns/SCORER/#.f#.partial"),
        ("tensorboard/train/events.out.tfevents.1.host.2", "tensorboard/STAGE/EVENTS"),
        ("prepared/.train.partial/seal.json", "prepared/.SPLIT.partial/seal.json"),
        ("evaluation/samples/ctpd.json.partial", "evaluation/samples/MODEL.json.partial"),
        ("trained.json", "trained.json"),
    ],
)
def test_what_is_alike_has_one_name(path, named):
    assert kind("open", path) == f"open {named}"


@pytest.mark.slow
def test_some_points_of_a_whole_run(tmp_path):
    """The first of them; `make soak` takes all."""
    script = str(Path(__file__).with_name("run.py"))
    command = [sys.executable, script, "kill", "full", "interrupt", "--dir", str(tmp_path), "--most", "6"]
    told = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""})
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    assert "soak: kill at 6 points, full at 6 points, interrupt at 6 points, 0 failures" in told.stdout
