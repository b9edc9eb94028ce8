"""The one exception that a user's mistake raises; the command line prints its message alone and exits with 2."""

import re

# https://name:password@host; one slash is what pathlib leaves of two.
_IN_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,3})[^/\s@\"'\\]+@", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a text without the names and passwords of the addresses in it."""
    return _IN_ADDRESS.sub(r"\1***@", text)


class UserError(ValueError):
    """A sentence that names the file, line, field or example at fault and says what to do about it."""

    def __init__(self, sentence: object = "") -> None:
        super().__init__(without_secrets(str(sentence)))
