"""Configuration, files, locks, buckets and worker processes. This package knows nothing of models, runs or scans."""


class UserError(ValueError):
    """An error that the user can correct. The message says in one line what is wrong, where, and what to do."""
