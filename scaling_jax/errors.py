"""The one exception that the command line prints as a line instead of a traceback."""


class UserError(ValueError):
    """A user's mistake: the message says what, where and what to do about it, in one line."""
