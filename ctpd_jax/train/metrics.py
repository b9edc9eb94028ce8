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
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ctpd_jax.artifacts import local_path, read_record, write_bytes, write_record
from ctpd_jax.errors import UserError
from ctpd_jax.processes import messages, stall

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_RESERVED = ("stage", "step", "time")
_SUM = "crc32"  # of the rest of its line, in hex


def read_metrics(workdir: str | os.PathLike[str], stage: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of `workdir`/metrics.jsonl, of one stage or of all, in their order; [] if there is no such file.

    A last line without its end (the process was killed in it) is left out; any other broken line is a UserError.
    """
    path = local_path(workdir) / METRICS
    if not path.exists():
        return []
    # Whatever stands behind the last line's end is what a killed process has left.
    *whole, _torn = path.read_text("utf-8", errors="replace").split("\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{number} is not JSON; remove that line.") from None
        if not isinstance(line, dict) or not all(name in line for name in _RESERVED):
            raise UserError(f"{path}:{number} has no stage, step and time; remove that line.")
        if line.pop(_SUM, None) not in (None, _sum(line)):  # a line of an earlier version has none
            raise UserError(f"{path}:{number} is damaged (it is not what was written); remove that line.")
        if stage is None or line["stage"] == stage:
            lines.append(line)
    return lines


def lost_lines(workdir: Path, lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the finished stages that told more updates than `lines`, the whole of metrics.jsonl, hold."""
    # A stage notes how many lines it has told when it is finished. One that was copied from another run has none here.
    counts = Counter(line["stage"] for line in lines)
    finished = {path.parent.name: read_record(path) or {} for path in sorted(workdir.glob("*/done.json"))}
    return [stage for stage, done in finished.items() if 0 < counts[stage] < done.get("told", 0)]


class MetricLog:
    """Append to `workdir`/metrics.jsonl and mirror the numbers into `workdir`/tensorboard/<stage>.

    `active=False` makes every call do nothing: for all processes but the first. `wandb` is a project of Weights &
    Biases that gets them too, with `config` beside the run's name. Raises UserError where that is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        active: bool = True,
        tensorboard: bool = True,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.workdir = local_path(workdir)
        self._active = active
        self._tensorboard = tensorboard
        self._wandb: Any = None
        self._writers: dict[str, Any] = {}
        self._purge: dict[str, int] = {}  # stage -> first step that TensorBoard shall forget
        if active:
            self.workdir.mkdir(parents=True, exist_ok=True)
            # A line that a killed process has torn would join the next one.
            path = self.workdir / METRICS
            data = path.read_bytes() if path.exists() else b""
            if data and not data.endswith(b"\n"):
                write_bytes(path, data[: data.rfind(b"\n") + 1])
            if wandb:
                self._wandb = _wandb_run(wandb, self.workdir, config or {})

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line. Values are numbers (Python, NumPy or JAX scalars), strings or bools."""
        if not self._active:
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        for name in values.keys() & {*_RESERVED, _SUM}:
            raise ValueError(f"A metric cannot be called {name!r}: every line has a field of that name.")
        # 1. The line.
        now = time.time()
        finite = _finite(values)
        line = {"stage": stage, "step": int(step), "time": round(now, 3), **finite}
        with open(self.workdir / METRICS, "ab") as out:
            out.write(_as_line(line))
        # 2. TensorBoard has them, but no texts.
        if self._tensorboard:
            writer = self._writer(stage)
            for name, value in values.items():
                if not isinstance(value, str):
                    writer.add_scalar(name, float(value), int(step), walltime=now)
        # 3. So has Weights & Biases, where every stage counts its own steps.
        if self._wandb:
            self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._wandb.log({f"{stage}/{name}": value for name, value in finite.items()} | {f"{stage}/step": int(step)})

    def rewind(self, stage: str, step: int) -> None:
        """Forget what `stage` logged after `step`: a run that resumes at a checkpoint logs those steps again."""
        if not self._active:
            return
        lines = read_metrics(self.workdir)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        if len(kept) < len(lines):
            write_bytes(self.workdir / METRICS, b"".join(map(_as_line, kept)))
        # TensorBoard hides them, once a writer begins at the step after.
        if stage in self._writers:
            self._writers.pop(stage).close()
        self._purge[stage] = step + 1

    def close(self) -> None:
        """Flush the event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from tensorboardX import SummaryWriter

            # The writer's own name has whole seconds: two in one would overwrite each other.
            self._writers[stage] = SummaryWriter(
                str(self.workdir / TENSORBOARD / stage),
                purge_step=self._purge.pop(stage, None),
                filename_suffix=f".{time.time_ns()}",
            )
        return self._writers[stage]


def _as_line(line: Mapping[str, Any]) -> bytes:
    return json.dumps({**line, _SUM: _sum(line)}, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _sum(line: Mapping[str, Any]) -> str:
    """Return the checksum of a line: a digit that was flipped would be another number."""
    return f"{zlib.crc32(json.dumps(line).encode()):08x}"


def _wandb_run(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    """Return the run of a workdir in a project of Weights & Biases; a repeated command goes on with it."""
    try:
        import wandb
    except ImportError:
        raise UserError("config.wandb needs the package wandb: pip install 'ctpd-jax[wandb]'.") from None
    known = read_record(workdir / "wandb.json") or {"id": uuid.uuid4().hex}
    write_record(workdir / "wandb.json", known)
    return wandb.init(
        project=project, name=workdir.name, id=known["id"], resume="allow", config=dict(config), dir=str(workdir)
    )


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON has them: None for NaN and infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


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
        # On a terminal tqdm counts and draws; a log file would get all of it in one line without end.
        self.total, self.description, self.done, self.unit = total, description, done, unit
        self._stream, self._every, self._clock, self._active = stream or sys.stderr, every, clock, active
        self._values: dict[str, float | str] = {}
        self._figures: Mapping[str, Any] = {}
        self._start = self._said = clock(), done
        self._watched = self._stream.isatty()
        self._draws = active and self._watched and not messages.quiet()
        bar = {"desc": description, "initial": done, "unit": unit, "dynamic_ncols": True}
        self._bar = tqdm(total=total, file=self._stream, disable=not self._draws, **bar)

    def update(self, number: int = 1, figures: Mapping[str, Any] | None = None, **values: float | str) -> None:
        """Count `number` more; `values` stand beside the bar until the next ones, `figures` in the log alone."""
        self.done += number
        self._figures = figures or self._figures
        if values:
            self._values = values
            self._bar.set_postfix_str(self._shown(), refresh=False)
        self._bar.update(number)
        stall.alive()
        if self._clock() - self._said[0] >= self._every:
            self._say("left")

    def write(self, text: str) -> None:
        """Write a line of text, above the bar."""
        if not self._active:
            return
        if self._draws:
            self._bar.clear()
        messages.say(text, shown=self._stream)
        if self._draws:
            self._bar.refresh()

    def __enter__(self) -> Progress:
        stall.alive()
        return self

    def __exit__(self, *_: object) -> None:
        stall.at_rest()
        self._bar.close()
        if self.done != self._said[1]:
            self._say("in all")

    def _shown(self) -> str:
        return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self._values.items())

    def _say(self, what: str) -> None:
        """Log how far it is, and where nobody watches print "train 120/1000 (12%), 3.4 step/s, 4:18 left, loss=0.69".

        The rate is that since the line before; of the last line, which tells the time "in all", since the start.
        """
        now, (then, count) = self._clock(), self._start if what == "in all" else self._said
        self._said = now, self.done
        if not self._active:
            return
        rate = (self.done - count) / max(now - then, 1e-9)
        seconds = now - then if what == "in all" else max(self.total - self.done, 0) / max(rate, 1e-9)
        share = 100 * self.done // max(self.total, 1)
        parts = [f"{self.description} {self.done}/{self.total} ({share}%)", f"{rate:.3g} {self.unit}/s"]
        parts.append(f"{tqdm.format_interval(round(seconds)).removeprefix('0')} {what}")
        text = ", ".join(parts + [self._shown()] * bool(self._values))
        figures = {"at": self.description, "done": self.done, "total": self.total, "per_second": round(rate, 4)}
        figures |= {f"seconds_{what.replace(' ', '_')}": round(seconds), **_finite({**self._figures, **self._values})}
        if self._watched:  # the bar says it
            messages.note(text, figures=figures)
        else:
            messages.say(text, shown=self._stream, figures=figures)
