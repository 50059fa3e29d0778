"""Does the critical batch size follow a power law of the loss? Two models of 1×32 and 2×64 on Python source, as bytes.

    scaling-jax scan experiments/demo.py          (or: scaling-jax demo)

Seven batch sizes of 128 … 8,192 tokens each, a learning-rate search at every one.
TIME_AND_RESULT
"""

from scaling_jax.scanning.demo import DEMO

EXPERIMENT = DEMO
