"""Preemption: SIGTERM asks a run to stop where nothing is lost; the launcher then gives the same command again.

One process: a handler notes the signal. A second SIGTERM kills, as SIGTERM does (it waits, as every Python handler, for
a call into C to return: while a program is compiled only SIGKILL kills).

Several processes must stop before the same update, or some would wait for ever in a collective for those that stopped.
There JAX listens: `jax.distributed.initialize` replaces the handler, and a handler set after it would silence JAX. What
one process is told, JAX tells all of them, and agrees with all of them on where to stop. A further SIGTERM does nothing
there, since every process may be sent its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ctpd_jax.processes.together import client, meet, several

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # the key by which JAX tells every process; nothing public asks for it
_EVERY = 1.0  # seconds between two looks for that key

_asked = threading.Event()  # by the handler: this process was sent the signal
_noticed = threading.Event()  # several processes: one of them was
_agreed = threading.Event()  # several processes: all of them stop here
_turns = itertools.count(1)  # several processes: JAX's name of a point is a number that grows over the whole run
_looked = -_EVERY
_by_itself = False  # several processes: this one is in a block of `apart`


class Preempted(Exception):
    """The run was asked to stop, and has. Its message: what of the work is kept; who knows the stage sets `where`."""

    where = "before the first stage"

    def __str__(self) -> str:
        return f"{self.where}: {self.args[0]}"


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Take SIGTERM as a request inside the block. To be opened first of all: before, SIGTERM kills."""
    # Only the main thread can set handlers; in another one, and where JAX listens already, nothing changes.
    if threading.current_thread() is not threading.main_thread() or several():
        yield
        return
    _asked.clear()
    before = signal.signal(signal.SIGTERM, _note)
    try:
        yield
    finally:
        if not several():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            _asked.clear()


def _note(number: int, frame: FrameType | None) -> None:
    _asked.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # No print(): the signal may have come in the middle of one.
    with contextlib.suppress(OSError):
        os.write(2, b"SIGTERM: the run stops as soon as nothing is lost by it; a second SIGTERM kills it.\n")


def _hand_over() -> None:
    """Give JAX the signal that came before it listened."""
    if _asked.is_set():
        _asked.clear()
        signal.raise_signal(signal.SIGTERM)


def requested() -> bool:
    """Return whether this process, or one of several, was asked to stop. Several do not learn it at the same moment."""
    global _looked
    if not several():
        return _asked.is_set()
    # JAX writes the notice into the store that all processes share; to ask for it costs a round trip.
    _hand_over()
    if not _noticed.is_set() and time.monotonic() - _looked >= _EVERY:
        _looked = time.monotonic()
        if _has(client(), _NOTICE):
            _noticed.set()
    return _noticed.is_set()


def _has(client: Any, key: str) -> bool:
    import jax

    try:
        client.key_value_try_get(key)
        return True
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return False


def stop_now() -> bool:
    """Return whether to stop here. Several processes get the same answer, if all of them ask equally often.

    So it is asked where all of them pass: before each stage and before each update, never in a block of `apart`.
    """
    if not several():
        return _asked.is_set()
    from jax.experimental import multihost_utils

    _hand_over()
    # JAX says yes at one number only, one more than the highest that any process had asked for.
    if not _agreed.is_set() and multihost_utils.reached_preemption_sync_point(next(_turns)):
        _agreed.set()
    return _agreed.is_set()


def check(kept: str) -> None:
    """Raise Preempted where the run was asked to stop, and what was done since the last file may be dropped.

    `kept` ends the sentence "stopped in annotate: ...". Of several processes one may stop by itself only in a block of
    `apart`: elsewhere the others could be waiting for it, and all go on to the next `stop_now`.
    """
    if (_by_itself or not several()) and requested():
        raise Preempted(kept)


@contextlib.contextmanager
def apart(name: str) -> Iterator[None]:
    """Let each process work by itself inside the block: on its share of something, or one of them for all.

    At its end they wait for each other, and where one was stopped in it, all of them stop.
    """
    global _by_itself
    if not several():
        yield
        return
    from jax.experimental import multihost_utils

    # 1. Each works, and may stop, by itself.
    stop, _by_itself = None, True
    try:
        yield
    except Preempted as error:
        stop = error
    finally:
        _by_itself = False
    # 2. All are here; where one was stopped, none goes on without it.
    meet(name)
    if multihost_utils.process_allgather(stop is not None).any():
        raise stop or Preempted("another process has stopped, and says what is kept")


@contextlib.contextmanager
def during(stage: str) -> Iterator[None]:
    """Names the stage in a Preempted that ends the block, or that comes before it, where the run is asked to stop."""
    where = f"before {stage}"
    try:
        if stop_now():
            raise Preempted("what comes before it is finished")
        where = f"in {stage}"
        yield
    except Preempted as stop:
        stop.where = where
        raise
