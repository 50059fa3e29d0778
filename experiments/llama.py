"""The demo with models like Llama: llama-1x32 and llama-2x64 on the source code of Python's library, as bytes.

    scaling-jax scan experiments/llama.py

Seven batch sizes, a learning-rate search at every one. Takes about 8 minutes on two CPU cores that do nothing else, for
one seed; the demo takes 13 for two. Expect B_crit from 2.3k to 7.3k tokens for the larger model between 1.95 and 1.6
nats per byte, the smaller model above it at the same loss, an exponent of -6.1 ± 0.9 with a level for each model, and a
better law in data, D_min^0.72: steeper than the demo's, at losses that its models don't reach. What came out is in
experiments/results/llama.
"""

from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.tasks import model_config

EXPERIMENT = Experiment(
    name="llama",
    subjects=(
        Subject(
            model_config("llama-1x32"),
            log_spaced(2.1, 1.85, 8),
            LearningRates(8e-3, 512, places=4, most=10),
        ),
        Subject(
            model_config("llama-2x64"),
            log_spaced(1.95, 1.6, 12),
            LearningRates(3e-3, 512, places=4, most=10),
        ),
    ),
    batch_tokens=powers_of_two(256, 16_384),
    max_tokens=12_000_000,
)
