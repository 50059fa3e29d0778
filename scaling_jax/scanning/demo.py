"""The demo's experiments: two small models on the Python standard library's source, bytes, on a laptop."""

from scaling_jax.scanning.experiment import Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.tasks import model_config

DEMO = Experiment(
    name="demo",
    subjects=(
        Subject(model_config("1x32"), log_spaced(2.9, 2.2, 12), LearningRates(8e-3, 2_048, places=2, most=10)),
        Subject(model_config("2x64"), log_spaced(2.9, 2.0, 15), LearningRates(4e-3, 4_096, places=2, most=10)),
    ),
    batch_tokens=powers_of_two(128, 8_192),
    max_tokens=8_000_000,
)

QUICK = Experiment(
    name="quick-demo",
    subjects=(
        Subject(model_config("1x16"), log_spaced(2.9, 2.6, 6), LearningRates(1.6e-2, 2_048, most=3)),
        Subject(model_config("1x32"), log_spaced(2.9, 2.5, 7), LearningRates(8e-3, 2_048, most=3)),
    ),
    batch_tokens=powers_of_two(128, 2_048),
    max_tokens=1_000_000,
)
