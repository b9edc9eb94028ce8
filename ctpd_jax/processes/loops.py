"""What libraries still say of themselves after something has failed, and nobody wants to hear.

Orbax reads and writes in event loops of asyncio. Where one part of a save or a restore fails, its loop is closed while
other parts are under way: those then complain, from threads of C++ or when they are collected, about the closed loop.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def quiet_loops() -> None:
    """Have closed loops not heard from here on."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    for name in ("excepthook", "unraisablehook"):
        before = getattr(sys, name)
        if getattr(before, "__name__", "") != "but_closed_loops":
            setattr(sys, name, without_closed_loops(before))


def without_closed_loops(hook: Callable[..., object]) -> Callable[..., None]:
    """Return an `excepthook` or `unraisablehook` that leaves them out."""

    def but_closed_loops(*given: Any) -> None:
        error = given[1] if len(given) > 1 else given[0].exc_value  # excepthook, unraisablehook
        if str(error) != "Event loop is closed":
            hook(*given)

    return but_closed_loops


def let_go(error: BaseException) -> None:
    """Collect what an error still holds, as half-done coroutines, and hear nothing of it."""
    quiet_loops()
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        sys.unraisablehook = hook


def last_line() -> None:
    """Leave the line that is said next the last one of the process."""
    quiet_loops()
    atexit.register(mute)  # the last that is registered is the first that runs


def mute() -> None:
    """What libraries still try while the process ends, as to write to a full disk, fails again: that is no news."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
