"""How long one waits before anything happens: imports, and a stage's first update with and without a warm cache.

    python benchmarks/startup.py
    python benchmarks/startup.py --config configs/demo.py --json startup.json

Each measurement is a process of its own. The first update is that of the config's first stage, from the command's start
to the first line of metrics.jsonl; the cache of compiled programs lies in the workdir, and the second time it is full.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from timing import ROUNDS, write

IMPORTS = {
    "import ctpd_jax": "import ctpd_jax",
    "and every public name": "import ctpd_jax; [getattr(ctpd_jax, name) for name in ctpd_jax.__all__]",
    "ctpd --help": "import sys; sys.argv = ['ctpd', '--help']; from ctpd_jax.cli import main; main()",
}


def seconds_of(program: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_update(config: str, workdir: Path) -> float:
    """Seconds from the command to its first line of metrics; the command is then stopped."""
    command = [sys.executable, "-m", "ctpd_jax.cli", "sft", "--model", "student"]
    start, metrics = time.perf_counter(), workdir / "metrics.jsonl"
    run = subprocess.Popen(
        [*command, "--config", config, "--workdir", str(workdir)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while not (metrics.exists() and '"step": 0' in metrics.read_text()):
            if run.poll() not in (None, 0):
                raise SystemExit((run.stderr.read() if run.stderr else b"").decode())
            time.sleep(0.02)
        return time.perf_counter() - start
    finally:
        run.kill()
        run.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo.py", metavar="FILE.py")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    figures: dict[str, Any] = {
        name: median(seconds_of(program) for _ in range(args.rounds)) for name, program in IMPORTS.items()
    }
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        first_update(args.config, Path(temporary) / "data")  # the data of a made-up world are made once
        for number in range(args.rounds):
            workdir = Path(temporary) / str(number)
            cold.append(first_update(args.config, workdir))
            cache = Path(temporary) / "cache"
            shutil.move(workdir / "compile_cache", cache)
            shutil.rmtree(workdir)
            workdir.mkdir()
            shutil.move(cache, workdir / "compile_cache")
            warm.append(first_update(args.config, workdir))
    figures |= {"first update, cold cache": median(cold), "first update, warm cache": median(warm)}
    for name, seconds in figures.items():
        print(f"{name:26} {seconds:6.2f} s")
    write(args.json, "startup", seconds=figures)


if __name__ == "__main__":
    main()
