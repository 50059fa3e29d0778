"""A run that takes a second, and text with something to learn: tokens count upwards, with jumps."""

import numpy as np

from scaling_jax.data import Corpus
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Run

RUN = Run(
    ModelConfig(n_layer=1, d_model=16, n_head=1, context=16),
    batch_tokens=128,
    learning_rate=1e-2,
    max_steps=40,
    eval_tokens=512,
    steps_per_call=8,
)


def _corpus() -> Corpus:
    draws = np.random.default_rng(0)
    stream = (np.cumsum(draws.integers(1, 4, 16 * 400)) % 257).astype(np.uint16)
    rows = stream[np.arange(399)[:, None] * 16 + np.arange(17)]
    return Corpus(rows[:320], rows[320:], 257, {"source": "counting", "sha256": "counting"})


CORPUS = _corpus()
