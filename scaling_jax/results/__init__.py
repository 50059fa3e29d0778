"""Reads results folders and tables: runs, measurements, noise scales and fits."""

from scaling_jax.results.measurements import Measurement, NoiseMeasurement
from scaling_jax.results.results import Analysis, Curve, Results, analyse, noise_ratios, read_results
from scaling_jax.results.runs import CellRuns, RunRecord

__all__ = [
    "Analysis",
    "CellRuns",
    "Curve",
    "Measurement",
    "NoiseMeasurement",
    "Results",
    "RunRecord",
    "analyse",
    "noise_ratios",
    "read_results",
]
