"""What ends a command with one sentence, and exit code 2: a user's mistake, or something that the machine lacks."""

from __future__ import annotations

import errno
import re

_GOES_ON = "then give the same command again: it goes on from what is whole"
_NO_ROOM = f"there is no space left; free some, {_GOES_ON}"
_LACKS = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EROFS: "it lies on a file system that is read-only; mount it for writing, or take another --workdir",
    errno.EACCES: "this user may not read or write it; change its owner or mode, or take another --workdir",
    errno.EPERM: "this user may not read or write it; change its owner or mode, or take another --workdir",
    errno.EIO: f"the disk does not answer; see the system's log, {_GOES_ON}",
    errno.ESTALE: f"the network's file system has lost it; mount it again, {_GOES_ON}",
    errno.EMFILE: f"too many files are open; raise `ulimit -n`, {_GOES_ON}",
    errno.ENFILE: f"too many files are open on this machine; {_GOES_ON}",
}
# https://name:password@host; one slash is what pathlib leaves of two.
_IN_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,3})[^/\s@\"'\\]+@", re.IGNORECASE)
# ?access_token=...
_TOKEN = re.compile(r"([?&][\w.-]*(?:token|signature|secret|password|key)=)[^&\s\"']+", re.IGNORECASE)


def printable(text: str) -> str:
    """Return foreign text as a message or a table may show it: on one line, and nothing in it steers the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_secrets(text: str) -> str:
    """Return a text without the names, passwords and tokens of the addresses in it."""
    return _TOKEN.sub(r"\1***", _IN_ADDRESS.sub(r"\1***@", text))


class UserError(ValueError):
    """A sentence that names the file, line, field or example at fault and says what to do about it."""

    def __init__(self, sentence: object = "") -> None:
        super().__init__(without_secrets(str(sentence)))


def lacking(error: BaseException, workdir: object = None) -> str | None:
    """Return the sentence for an error that says that the machine lacks something: room, memory, a right.

    The place is the file, where the error names one, else the `workdir`. None: the error is of another kind, a fault
    of this program or of a library.
    """
    for one in _chain(error):
        # 1. What the system says; a library in C++ has but a text.
        if isinstance(one, OSError) and one.errno in _LACKS:
            return f"{one.filename or workdir or 'a file'}: {_LACKS[one.errno]}."
        if "No space left on device" in str(one):
            return f"{workdir or 'a file'}: {_NO_ROOM}."
        # 2. Memory, of the host or of a device.
        if isinstance(one, MemoryError):
            return f"The host has too little memory ({one or 'an array could not be made'}); {_less('host')}."
        if type(one).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(one):
            said = str(one).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
            return f"The device has too little memory ({said}); {_less('device')}."
    return None


def _less(where: str) -> str:
    advice = "a smaller micro_batch of that stage, its model's remat=full, adapters (lora.rank) over a bfloat16 base"
    more = "a mesh with fsdp over more devices" if where == "device" else "more processes"
    return f"take {advice}, or {more}: `ctpd plan` with the same config says what fits"


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error and those that it came from."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return found
