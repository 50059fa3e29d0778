"""Does the critical batch size follow a power law of the loss? Two models of 1×32 and 2×64 on Python source, as bytes.

    scaling-jax scan experiments/demo.py          (or: scaling-jax demo)

Seven batch sizes of 128 … 8,192 tokens each, a learning-rate search at every one: 68 runs. Takes 7 to 12 minutes on two
CPU cores. Expect the hyperbola to be rejected, and with a free shape B_crit to rise from some 800 tokens at a loss of
2.9 nats per byte to 4k at 2.0, as L^(-4.7 ± 2.2), and a noise scale about as large. results/demo holds ours.
"""

from scaling_jax.scanning.experiment import DEMO

EXPERIMENT = DEMO
