"""Does the critical batch size follow a power law of the loss? Two models of 1×32 and 2×64 on Python source, as bytes.

    scaling-jax scan experiments/demo.py          (or: scaling-jax demo)

Seven batch sizes of 256 … 16,384 tokens and two seeds each, a learning-rate search at every one: 114 runs. Takes 7 to
13 minutes on two CPU cores that do nothing else. Expect hyperbolas at every loss, B_crit from 1.7k to 3.7k tokens for
the larger model between 2.3 and 1.9 nats per byte, a common exponent of -4.0 ± 0.5 with a level for each model, the
smaller model above the larger at the same loss, and a better law in data, D_min^0.54. results/demo holds ours.
"""

from scaling_jax.scanning.experiment import DEMO

EXPERIMENT = DEMO
