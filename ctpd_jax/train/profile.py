"""What the devices do in some updates, as JAX's profiler sees it: for TensorBoard or xprof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

PROFILE = "profile"  # its folder in the workdir; every process adds its own file


def traced(steps: range, seen: range, folder: Path) -> Iterator[int]:
    """Yield the updates `steps`, in order; what is done in those of `seen` is written into `folder`."""
    inside = False
    try:
        for step in steps:
            if step in seen and not inside:
                jax.profiler.start_trace(str(folder))
                inside = True
            yield step
            # The next update would begin before this one has ended: devices work through what they are given in order.
            if inside and step + 1 not in seen:
                jnp.zeros(()).block_until_ready()
                jax.profiler.stop_trace()
                inside = False
    finally:  # a stage that ends meanwhile leaves what was seen
        if inside:
            jax.profiler.stop_trace()
