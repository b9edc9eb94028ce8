"""What a run reports: `metrics.jsonl`, TensorBoard event files beside it, and a progress bar.

One JSON object a line, flat: {"stage": "train", "step": 10, "time": 1767225600.0, "loss": 0.69, "grad_norm": 1.2}.
A value that is not finite is null there, so that every line is JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from ctpd_jax.artifacts import local_path, write_bytes
from ctpd_jax.errors import UserError

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_RESERVED = ("stage", "step", "time")


def read_metrics(workdir: str | os.PathLike[str], stage: str | None = None) -> list[dict[str, Any]]:
    """The lines of `workdir`/metrics.jsonl, of one stage or of all, in their order; [] if there is no such file.

    A last line without its end (the process was killed in it) is left out; any other broken line is a UserError.
    """
    path = local_path(workdir) / METRICS
    if not path.exists():
        return []
    *whole, _torn = path.read_text("utf-8", errors="replace").split("\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
        except ValueError:
            raise UserError(f"{path}:{number} is not JSON; remove that line.") from None
        if not isinstance(line, dict) or not all(name in line for name in _RESERVED):
            raise UserError(f"{path}:{number} has no stage, step and time; remove that line.")
        if stage is None or line["stage"] == stage:
            lines.append(line)
    return lines


class MetricLog:
    """Appends to `workdir`/metrics.jsonl and mirrors the numbers into `workdir`/tensorboard/<stage>.

    `active=False` makes every call do nothing: for all processes but the first.
    """

    def __init__(self, workdir: str | os.PathLike[str], active: bool = True, tensorboard: bool = True) -> None:
        self.workdir = local_path(workdir)
        self._active = active
        self._tensorboard = tensorboard
        self._writers: dict[str, Any] = {}
        self._purge: dict[str, int] = {}  # stage -> first step that TensorBoard shall forget
        if active:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._drop_torn_line()

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """One line. Values are numbers (Python, NumPy or JAX scalars), strings or bools."""
        if not self._active:
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        if taken := [name for name in _RESERVED if name in values]:
            raise ValueError(f"A metric cannot be called {taken[0]!r}: every line has a field of that name.")
        now = time.time()
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"stage": stage, "step": int(step), "time": round(now, 3), **finite}
        with open(self.workdir / METRICS, "ab") as out:
            out.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        if self._tensorboard:
            writer = self._writer(stage)
            for name, value in values.items():
                if not isinstance(value, str):
                    writer.add_scalar(name, float(value), int(step), walltime=now)

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what `stage` logged after `step`: a run that resumes at a checkpoint logs those steps again."""
        if not self._active:
            return
        lines = read_metrics(self.workdir)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        if len(kept) < len(lines):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            write_bytes(self.workdir / METRICS, text.encode())
        if stage in self._writers:
            self._writers.pop(stage).close()
        self._purge[stage] = step + 1

    def close(self) -> None:
        """Flushes the event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[stage] = SummaryWriter(
                str(self.workdir / TENSORBOARD / stage),
                purge_step=self._purge.pop(stage, None),
                filename_suffix=f".{time.time_ns()}",  # the name has whole seconds: two in one would overwrite
            )
        return self._writers[stage]

    def _drop_torn_line(self) -> None:
        path = self.workdir / METRICS
        if not path.exists():
            return
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            write_bytes(path, data[: data.rfind(b"\n") + 1])


def _plain(value: Any) -> bool | int | float | str:
    if hasattr(value, "item"):  # a NumPy or JAX scalar
        value = value.item()
    if not isinstance(value, bool | int | float | str):
        raise TypeError(f"A metric is a number, a string or a bool, not {type(value).__name__}.")
    return value


class Progress:
    """A bar with rate and remaining time; where nobody watches (no terminal), a line every `every` seconds.

    with Progress(total=1000, description="train", done=300) as progress:
        progress.update(1, loss=0.69)
    """

    def __init__(
        self,
        total: int,
        description: str,
        done: int = 0,
        unit: str = "step",
        every: float = 30.0,
        active: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.description, self.done, self.unit = total, description, done, unit
        self._every, self._clock = every, clock
        self._stream = stream or sys.stderr
        self._active = active
        self._values: dict[str, Any] = {}
        self._started, self._first = clock(), done
        self._said, self._said_done = self._started, done
        self._bar: Any = None
        if active and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=description, unit=unit, file=self._stream, dynamic_ncols=True
            )

    def update(self, number: int = 1, **values: Any) -> None:
        """`number` more are done; `values` (numbers or strings) stand beside the bar until the next ones."""
        self.done += number
        self._values |= values
        if not self._active:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._shown(), refresh=False)
            self._bar.update(number)
        elif self._clock() - self._said >= self._every:
            self._say()

    def write(self, text: str) -> None:
        """A line of text, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._active:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._active and self.done != self._said_done:
            self._say(last=True)
        self._active = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(self, last: bool = False) -> None:
        """Prints "train 120/1000 (12%), 3.4 step/s, 4:18 left, loss=0.69"; the rate is that since the line before."""
        now = self._clock()
        since, count = (self._started, self._first) if last else (self._said, self._said_done)
        rate = (self.done - count) / max(now - since, 1e-9)
        share = 100 * self.done // max(self.total, 1)
        parts = [f"{self.description} {self.done}/{self.total} ({share}%)", f"{rate:.3g} {self.unit}/s"]
        if last:
            parts.append(f"{_duration(now - self._started)} in all")
        elif rate > 0:
            parts.append(f"{_duration(max(self.total - self.done, 0) / rate)} left")
        if self._values:
            parts.append(self._shown())
        print(", ".join(parts), file=self._stream, flush=True)
        self._said, self._said_done = now, self.done

    def _shown(self) -> str:
        return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self._values.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
