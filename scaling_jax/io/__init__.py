"""Configuration, files, locks, buckets and worker processes. This package knows nothing of models, runs or scans."""

import functools
import sys


class UserError(ValueError):
    """An error that the user can correct. The message says in one line what is wrong, where, and what to do."""


@functools.cache
def note(text: str) -> None:
    """Prints one line on standard error, once: of something that was wrong and that the program has dealt with."""
    print(f"scaling-jax: note: {text}".replace("\n", " "), file=sys.stderr, flush=True)
