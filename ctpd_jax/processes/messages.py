"""What a command says: on the screen, and with `--log FILE` as JSON lines.

Everything goes to the logger "ctpd_jax" too: who calls this library may give it a handler.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ctpd_jax.errors import UserError

LOG = logging.getLogger("ctpd_jax")
LOG.setLevel(logging.INFO)
LOG.propagate = False  # what is printed here must not be printed by a handler of the root's, too
LOG.addHandler(logging.NullHandler())  # else Python would print by itself what no handler takes

_quiet = False


class _JSONLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps(told | getattr(record, "figures", {}), ensure_ascii=False)


@contextlib.contextmanager
def heard(log: Path | None, quiet: bool) -> Iterator[None]:
    """Inside the block write every message to `log` too, and with `quiet` show only warnings and errors.

    Raises UserError where `log` cannot be written.
    """
    global _quiet
    # A file that cannot be written is told before anything is done.
    handler: logging.Handler = logging.NullHandler()
    if log is not None:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(log, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"--log {log} cannot be written: {error.strerror}.") from None
        handler.setFormatter(_JSONLines())
    before, _quiet = _quiet, quiet
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        handler.close()
        _quiet = before


def quiet() -> bool:
    """Return whether only warnings and errors are shown."""
    return _quiet


def note(text: str, level: int = logging.INFO, figures: Mapping[str, Any] | None = None) -> None:
    """Tell the log alone; `figures` are fields of its line, beside the text."""
    # The text is no format: it may hold a "%".
    LOG.log(level, "%s", text, extra={"figures": dict(figures or {})})


def say(
    text: str, level: int = logging.INFO, shown: TextIO | None = None, figures: Mapping[str, Any] | None = None
) -> None:
    """Tell a message, to stdout; to stderr what is at least a warning; or where it is to be `shown`. See `note`."""
    note(text, level, figures)
    if level >= logging.WARNING or not _quiet:
        print(text, file=shown or (sys.stderr if level >= logging.WARNING else sys.stdout), flush=True)


def fail(text: str) -> None:
    """Tell why a command ends."""
    say(text, logging.ERROR)
