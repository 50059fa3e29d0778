"""`scaling-jax …`: parse, call, print."""

from scaling_jax.cli.main import main

__all__ = ["main"]
