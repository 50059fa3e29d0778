"""What it means that draws agree with a closed form."""

import numpy as np


def assert_mean(draws, truth, standard_errors=3.0):
    """The mean of draws lies within so many standard errors of the truth."""
    draws = np.asarray(draws, np.float64)
    z = (draws.mean() - truth) / (draws.std(ddof=1) / np.sqrt(len(draws)))
    assert abs(z) < standard_errors, f"mean {draws.mean():.5g}, truth {truth:.5g}: {z:.2f} standard errors off"
