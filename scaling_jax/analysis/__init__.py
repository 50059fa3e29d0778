"""A results folder into measurements, fits and what to say about them."""

from scaling_jax.analysis.fit import Analysis, analyse, noise_ratios, read_experiment
from scaling_jax.analysis.measurements import Measurement
from scaling_jax.analysis.noise import NoiseMeasurement

__all__ = ["Analysis", "Measurement", "NoiseMeasurement", "analyse", "noise_ratios", "read_experiment"]
