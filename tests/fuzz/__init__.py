"""The fuzzer of the text rooms: `make fuzz`. run.py is the command, a file each for what it tries."""

from __future__ import annotations

import resource
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5  # failures that are told in full


@dataclass
class Found:
    """What was tried, and what failed, each with what it takes to see it again."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def merge(self, other: Found) -> None:
        self.counts.update(other.counts)
        self.failures += other.failures

    @contextmanager
    def told(self, **how: Any) -> Iterator[None]:
        """Note what fails inside, an assertion or any exception, with `how` it came about."""
        try:
            yield
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.name}, line {last.lineno}: {last.line}"
            # A long value is cut, so that the seed is always told; the smallest one that fails stands beside it.
            said = ", ".join(f"{name}={value!a:.1000}" for name, value in how.items())
            self.failures.append(f"{type(error).__name__}: {str(error)[:300]}\n    in {where}\n    of {said}")


def smallest(value: str, fails: Callable[[str], bool], tries: int = 400) -> str:
    """Return the shortest part of a text found by cutting pieces out of it that still `fails`."""
    size = max(len(value) // 2, 1)
    while size:
        place = 0
        while place < len(value) and tries > 0:
            shorter = value[:place] + value[place + size :]
            tries -= 1
            if fails(shorter):
                value = shorter
            else:
                place += size
        size //= 2
    return value


def peak_megabytes() -> int:
    """The most memory that this process has had so far: what it grows by is somebody's need."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
