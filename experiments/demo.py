"""Does the critical batch size follow a power law of the loss? Two models of 1×32 and 2×64 on Python source, as bytes.

    scaling-jax scan experiments/demo.py          (or: scaling-jax demo)

Seven batch sizes of 128 … 8,192 tokens each, a learning-rate search at every one.
Takes 5 to 8 minutes on two CPU cores: 42 runs, 41 million tokens. Expect B_crit to rise from about 350 tokens at a loss
of 2.9 nats per byte to 2.3k at 2.2 (1×32) and 3.4k at 2.0 (2×64), an exponent of about -7 over that range, and a noise
scale of 1 to 3 times B_crit. results/demo holds ours.
"""

from scaling_jax.scanning.experiment import DEMO

EXPERIMENT = DEMO
