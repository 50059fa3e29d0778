"""The folder for what can be made again: packed text, compiled programs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SCALING_JAX_CACHE`, else `scaling_jax` in the user's cache folder."""
    chosen = os.environ.get("SCALING_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaling_jax"
