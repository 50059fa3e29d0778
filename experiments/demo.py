"""Does the critical batch size follow a power law of the loss? Two models of 1×32 and 2×64 on Python source, as bytes.

    scaling-jax scan experiments/demo.py          (or: scaling-jax demo)

Seven batch sizes of 128 … 8,192 tokens each, a learning-rate search at every one: 68 runs. Takes 7 to 12 minutes on two
CPU cores. Expect B_crit to rise from 300 or 400 tokens at a loss of 2.9 nats per byte to 2.3k at 2.2 (1×32) and 3.4k at
2.0 (2×64), and a noise scale of 1.6 times B_crit in the median. The exponent is about -7 over that range, but -4.6 at
losses below 2.35: don't trust the law beyond its losses. results/demo holds ours.
"""

from scaling_jax.scanning.experiment import DEMO

EXPERIMENT = DEMO
