"""Which batch size for a budget? The best batch against the horizon, and B_crit, from annealed losses.

    scaling-jax scan experiments/horizon.py

The demo's smaller model (1×32) on Python source. For each batch size and learning rate, one run at a constant rate,
from which decays to zero over the last tenth of a horizon branch off, at horizons of 131k to 1.05M tokens. The search
tries learning rates in steps of √2 until at each horizon the best one lies between two others. Look at the losses as
losses at budgets (the best batch at each horizon), or as steps to a loss (B_crit):

    scaling-jax fit results/horizon
    scaling-jax fit results/horizon --to-steps

Takes 6 to 12 minutes on two CPU cores by its dry run (`--dry-run`): a trunk and its decays take 1.09 times the tokens
of the longest run. What came out of an earlier form, with four fixed rates at each batch size, is in
experiments/results/horizon. At every horizon the smallest batches are the best, as far as can be told; 4,096 tokens
cost 0.41 nats at 131k tokens, 0.21 at 1.05M. B_crit is 1.6k tokens [1.3k, 2.0k] at 2.39 nats and 2.1k [1.8k, 2.5k] at
2.19; further down too few batches reach the loss. The demo, at constant rates, has 2.6k at 2.22 nats for this model:
small batches gain more from a decay than large ones do, so B_crit of decayed runs is lower.
"""

from scaling_jax import BudgetScan, BudgetSubject, LearningRates, log_horizons, model_config, powers_of_two

BATCHES = powers_of_two(256, 16_384)

EXPERIMENT = BudgetScan(
    name="horizon",
    subjects=(
        BudgetSubject(
            model_config("1x32"),
            log_horizons(2**17, 2**20, per_doubling=1, largest_batch=BATCHES[-1]),
            LearningRates(8e-3, 512, places=2),
        ),
    ),
    batch_tokens=BATCHES,
    eval_tokens=65_536,
)
