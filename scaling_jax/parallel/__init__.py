"""Devices into one SPMD program."""

from scaling_jax.parallel.spmd import AXIS, Backend, replicate, spmd

__all__ = ["AXIS", "Backend", "replicate", "spmd"]
