"""Fitted scans without noise whose S_min(L) and B_crit(L) are known, as hyperbolas and with other shapes."""

import functools

import numpy as np

from scaling_jax.fitting import fit_scan
from tests.fitting.planted import Planted

PLANTED = Planted(noise=0.0, kind="independent")
PLANTED_NOISY = Planted(noise=0.03, kind="independent")


def b_crit(loss):
    return PLANTED.b_crit(loss)


def local_b_crit(loss):
    """dE_min/dS_min, where S_min goes as L^-6 and B_crit as L^-4.8."""
    return (6 + 4.8) / 6 * b_crit(loss)


def s_min(loss):
    """Of model1, the better one."""
    return 300.0 * (2.9 / loss) ** 6 / 1.3


@functools.cache
def fitted(noise=0.0):
    planted = PLANTED_NOISY if noise else PLANTED
    columns = planted.columns(np.random.default_rng(0))
    # model0 has no measurements below a loss of 2, so that model1 is the one that got lowest
    kept = (columns["model"] == "model1") | (columns["target_loss"] > 2.0)
    return fit_scan(**{name: column[kept] for name, column in columns.items()}, resamples=300)


@functools.cache
def fitted_free(a, noise=0.003):
    """The same with steps as 1 + (B_crit/B)^a."""
    columns = PLANTED.columns(np.random.default_rng(0))
    ratio = PLANTED.b_crit(columns["target_loss"]) / columns["batch_tokens"]
    errors = noise * np.random.default_rng(1).standard_normal(ratio.shape)
    columns["steps"] = columns["steps"] / (1 + ratio) * (1 + ratio**a) * np.exp(errors)
    return fit_scan(**columns)
