"""The demo with models like Llama: llama-1x32 and llama-2x64 on the source code of Python's library, as bytes.

    scaling-jax scan experiments/llama.py

NOT RUN YET. A step takes as long as one of the demo's models of the same size. Single runs at 1,024 tokens reach 2.0
nats (llama-1x32) and 1.87 (llama-2x64) after 0.4M tokens.
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
