"""Devices into one SPMD program."""

from scaling_jax.parallel.spmd import AXIS, Backend, deal_out, replicate, spmd

__all__ = ["AXIS", "Backend", "deal_out", "replicate", "spmd"]
