"""The world outside: files, locks, stores, worker processes. Knows nothing of models, runs or scans."""


class UserError(ValueError):
    """A user's mistake: the message says what, where and what to do about it, in one line."""
