import numpy as np
import pytest

from scaling_jax.data import Corpus


@pytest.fixture(scope="session")
def corpus():
    """Text with something to learn: tokens count upwards, with jumps."""
    draws = np.random.default_rng(0)
    stream = (np.cumsum(draws.integers(1, 4, 16 * 400)) % 257).astype(np.uint16)
    rows = stream[np.arange(399)[:, None] * 16 + np.arange(17)]
    return Corpus(rows[:320], rows[320:], 257, {"source": "counting", "sha256": "counting"})
