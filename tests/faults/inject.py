"""A fault at a point where a run writes: the process is killed or interrupted there, or from there on the disk is full.

An audit hook of Python is told of every file that is opened for writing, renamed, made or removed, before it happens.
What libraries in C++ write (tensorstore's and array_record's data) lies between two such events.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
NEEDS_ROOM = ("open", "mkdir", "link", "symlink")
STAGES = ("teacher_sft", "student_sft", "positive", "negative", "student_dpo", "train", "student_proposed")
_ANY_STAGE = "|".join(STAGES)
# Alike wherever they stand: stages, scorers, splits, numbers.
ALIKE = (
    (rf"^({_ANY_STAGE})\b", "STAGE"),
    (r"columns/\w+", "columns/SCORER"),
    (rf"^tensorboard/({_ANY_STAGE})\b", "tensorboard/STAGE"),
    (r"^tensorboard/(annotations|evaluation|proposals)(/\w+)?(/\w+)?", "tensorboard/READ"),
    (r"events\.out\.tfevents.*", "EVENTS"),
    (r"samples/\w+\.", "samples/MODEL."),
    (r"^prepared/(\.?)(train|test|answers|proposed)\b", r"prepared/\1SPLIT"),
    (r"^data_(train|test|answers|proposed)\b", "data_SPLIT"),
    (r"\d+", "#"),
)


def kind(operation: str, path: str, each: bool = False) -> str:
    """Return the name of a write point: the operation, and the path below the workdir with its names folded.

    With `each` only numbers are: a point is another one in each stage.
    """
    for pattern, name in ALIKE[-1:] if each else ALIKE:
        path = re.sub(pattern, name, path)
    return f"{operation} {path}"


def install(workdir: Path, points: Path, fault: str, each: bool = False) -> None:
    """Let the fault come at the first point that is not in the file `points`, which it is added to.

    kill       SIGKILL before the operation; the file that was opened just before is left half-written
    interrupt  SIGINT, as by Ctrl-C
    full       "no space left on device", there and at every point after it that needs room
    """
    root, known = os.path.join(workdir, ""), set(points.read_text().splitlines() if points.exists() else ())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    begun: tuple[str, int] | None = None  # the file that was opened last, and its size then
    struck = False

    def hook(event: str, given: tuple) -> None:
        nonlocal begun, struck
        operation, path = _write_of(event, given)
        if not path or not path.startswith(root) or path == root + "lock":
            return
        point, before = kind(operation, path.removeprefix(root), each), begun
        begun = (path, os.path.getsize(path) if os.path.exists(path) else 0) if operation == "open" else None
        if not struck and (point in known or (fault == "full" and operation not in NEEDS_ROOM)):
            return
        if not struck:
            struck = True
            _note(points, point)
            if fault == "kill":
                _tear(before)
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
        if fault == "full" and operation in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    sys.addaudithook(hook)


def _write_of(event: str, given: tuple) -> tuple[str, str]:
    """Return the operation and the path that it makes or takes away; ("", "") for what changes nothing."""
    path: object = None
    if event == "open":
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        path = given[0] if given[2] & writes else None
    elif event in EVENTS:
        path = given[1] if event in ("os.rename", "os.link", "os.symlink") else given[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return "", ""
    return event.rpartition(".")[2], os.path.abspath(os.fsdecode(path))


def _note(points: Path, point: str) -> None:
    # By a descriptor: the process may end before a file object has written anything.
    file = os.open(points, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{point}\n".encode())
    os.fsync(file)
    os.close(file)


def _tear(before: tuple[str, int] | None) -> None:
    """Leave half of what was written into the file that was opened last, as a kill in the middle of that would."""
    if before and os.path.exists(before[0]):
        path, size = before
        os.truncate(path, (size + os.path.getsize(path) + 1) // 2)


def forked(work: Callable[[], int], log: Path) -> int:
    """Run `work` in a fork to its end; return its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start(work, log), 0)[1])


def start(work: Callable[[], int], log: Path) -> int:
    """Begin `work` in a fork, its output appended to `log`; return the number of that process."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
