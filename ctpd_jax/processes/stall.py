"""Several processes that stand still: each says where, and ends, so that the launcher starts all of them again.

A process that waits for another one in a collective waits for ever: nothing tells it that the other one left the path,
or that a link between them is dead while both live. Work counts as alive whenever its progress bar moves.
"""

from __future__ import annotations

import faulthandler
import sys

from ctpd_jax.processes.together import several

_seconds = 0.0


def allow(minutes: float) -> None:
    """From now on work may stand still for so long; 0: for ever, as a process that is alone always may."""
    global _seconds
    _seconds = 60 * minutes


def alive() -> None:
    """Something was done. If nothing more is for too long, every thread's stack goes to stderr, and the exit code is 1.

    That ends the process as a kill does: what it was writing is not there, what it had saved is.
    """
    # A process that is alone waits for nobody: where it is slow, it is at work.
    if _seconds and several():
        assert sys.__stderr__  # a notebook's own is no file
        faulthandler.dump_traceback_later(_seconds, exit=True, file=sys.__stderr__)


def at_rest() -> None:
    """What was watched is over."""
    faulthandler.cancel_dump_traceback_later()
