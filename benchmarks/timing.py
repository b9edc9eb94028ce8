"""What the benchmarks share: fair timing, the rate at which the machine multiplies, and one form of results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

ROUNDS = 5


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each side, A B A B: what else the machine does then hits all of them alike.

    Every side runs once before, to compile and to warm up, and has to be finished when it returns.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(own) for name, own in seconds.items()}


def matmul_gflops(size: int = 2048) -> float:
    """Median rate of float32 products of XLA on this machine, size x size each, in 1e9 FLOP/s."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    seconds = alternate({"product": lambda: product(a).block_until_ready()}, rounds=9)
    return 2 * size**3 / median(seconds["product"]) / 1e9


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores, versions."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    versions = {"python": platform.python_version()}
    for name in ("jax", "flax", "numpy", "torch", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "processor": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def write(path: Path | None, benchmark: str, **figures: Any) -> None:
    """Writes {"benchmark", "date", "machine", ...figures} to `path`, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"benchmark": benchmark, "date": time.strftime("%Y-%m-%d"), "machine": machine(), **figures}
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
