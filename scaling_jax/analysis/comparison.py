"""The critical batch size measured in three ways, at the same losses: three_measurements.csv."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scaling_jax.analysis.branches import BranchMeasurement
from scaling_jax.analysis.noise import NoiseMeasurement
from scaling_jax.fitting import ScanFit

_ENDS = ("b_crit", "low", "high")  # of a branch measurement
_NEAR = 0.04  # of log loss: measurements so close to a loss count as its


class Comparison(NamedTuple):
    """One model at one loss of the scan's fit; tokens, with 95 % intervals or, for several runs, the middle half."""

    model: str
    loss: float  # nats per token
    scan: float
    scan_low: float
    scan_high: float
    noise_scale: float  # median over runs; NaN where none was measured, infinite where most are unresolved
    noise_scale_low: float
    noise_scale_high: float
    branches: float  # median over points and seeds; NaN where none was measured
    branches_low: float
    branches_high: float


def compare(fit: ScanFit, noise: Sequence[NoiseMeasurement], branches: Sequence[BranchMeasurement]) -> list[Comparison]:
    """A row for each loss at which the scan's B_crit enters its law."""
    rows = []
    for point in fit.points:
        if not point.in_law:
            continue

        def near(measured, point=point):
            return [m for m in measured if m.model == point.model and abs(math.log(m.loss / point.loss)) < _NEAR]

        scales = [m.b_simple if m.resolved else math.inf for m in near(noise)]
        low, middle, high = np.quantile(scales, (0.25, 0.5, 0.75), method="nearest") if scales else (math.nan,) * 3
        here = near(branches)
        from_branches = [float(np.median([getattr(m, name) for m in here])) if here else math.nan for name in _ENDS]
        scan = point.tradeoff
        rows.append(
            Comparison(
                point.model,
                point.loss,
                scan.b_crit,
                *scan.b_crit_interval,
                float(middle),
                float(low),
                float(high),
                *from_branches,
            )
        )
    return rows
