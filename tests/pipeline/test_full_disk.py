"""A disk that is full, or read-only, in a real file system: also for what libraries in C++ write.

In a name space of its own, where anybody may mount; a machine that does not allow that skips these tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MICRO

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
SIZES = (1, 2, 4, 6, 8, 10, 12, 14, 16)  # MB; a run takes 17

SCRIPT = """
disk=$1; shift
mount -t tmpfs -o size=1m tmpfs $disk || exit 77
for size in {sizes} 1000; do
  mount -o remount,size=${{size}}m $disk
  "$@" run --config {config} --workdir $disk/run > $disk.$size.log 2>&1
  echo "$size $? $(tail -1 $disk.$size.log)"
done
mount -o remount,ro $disk
for command in "run --config {config}" "inspect --config {config} --pair 0" status report; do
  "$@" $command --workdir $disk/run > $disk.ro.log 2>&1
  echo "${{command%% *}} $? $(tail -1 $disk.ro.log)"
done
cp -r $disk/run $disk.kept
"""


def mounting() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def digests(workdir: Path) -> dict[str, str]:
    found = {path.parent.name: json.loads(path.read_text()) for path in workdir.glob("*/done.json")}
    return {stage: done["params"] for stage, done in found.items() if "params" in done}


@pytest.mark.slow
@pytest.mark.skipif(not mounting(), reason="this machine lets nobody mount in a name space of his own")
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tmp_path, finished_micro):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = SCRIPT.format(sizes=" ".join(map(str, SIZES)), config=MICRO)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    command = [*UNSHARE, "sh", "-c", script, "sh", str(disk), sys.executable, "-m", "ctpd_jax.cli"]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if told.returncode == 77:
        pytest.skip("no tmpfs can be mounted here")
    lines = dict(line.split(" ", 1) for line in told.stdout.splitlines())
    for size in SIZES:
        assert lines[str(size)].startswith("2 ctpd run: "), lines[str(size)]
        assert ": there is no space left; free some" in lines[str(size)]
    assert lines["1000"].startswith("0 ")
    # Read-only: what only looks does, what would write says so.
    assert lines["run"].startswith("2 ") and "read-only" in lines["run"]
    assert lines["report"].startswith("2 ") and "read-only" in lines["report"]
    assert lines["status"].startswith("0 ") and lines["inspect"].startswith("0 "), lines["inspect"]
    assert digests(tmp_path / "disk.kept") == digests(Path(finished_micro))
