"""A fitted scan without noise whose S_min(L) and B_crit(L) are known."""

import functools

import numpy as np

from scaling_jax.fitting import fit_scan
from tests.fitting.planted import Planted

PLANTED = Planted(noise=0.0, kind="independent")
PLANTED_NOISY = Planted(noise=0.03, kind="independent")


def b_crit(loss):
    return PLANTED.b_crit(loss)


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
