"""The one exception that a user's mistake raises; the command line prints its message alone and exits with 2."""


class UserError(ValueError):
    """A sentence that names the file, line, field or example at fault and says what to do about it."""
