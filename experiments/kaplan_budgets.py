"""The best batch for a budget at Kaplan et al.'s sizes: 3M and 85M parameters with a decaying learning rate.

    scaling-jax compile experiments/kaplan_budgets.py --topology v5e:16x16        (needs no TPU)
    scaling-jax scan experiments/kaplan_budgets.py

Kaplan et al. 2020 trained with a learning rate that falls to zero by a cosine (section 2.2). kaplan_3m_85m.py asks for
steps to a loss, which takes constant rates. This asks, of the same models and text, for the loss at budgets, with
decays over the last fifth of each: see horizon.py, which is the same at a laptop's size. The cosine itself has another
B_crit than short decays have (decays.py).

NOT RUN YET, on any machine. A trunk and its decays take 1.18 times the tokens of the longest run. With three learning
rates at each of seven batch sizes:

                            3M           85M
    tokens               1.1e11        1.1e11     horizons of 0.5e9 to 4.3e9
    FLOPs                1.2e19        9.1e19
    v5e chip-hours           80           320     at 20 % and 40 % of the chips' peak
    H100-hours               16            64

What to expect: a best batch that grows with the horizon, near the published laws of B_opt(D), which `scaling-jax advise
results/kaplan_budgets --tokens 4e9` shows beside it.
"""

from scaling_jax import BudgetScan, BudgetSubject, LearningRates, log_horizons, model_config, powers_of_two
from scaling_jax.training import OptimizerConfig

BATCHES = powers_of_two(2**15, 2**21)
HORIZONS = log_horizons(2**29, 2**32, per_doubling=1, largest_batch=BATCHES[-1])

EXPERIMENT = BudgetScan(
    name="kaplan_budgets",
    subjects=(
        BudgetSubject(
            model_config("4x256", context=1_024, vocab_size=50_257, compute_dtype="bfloat16"),
            HORIZONS,
            LearningRates(4e-3, 2**18, most=5),
        ),
        BudgetSubject(
            model_config("12x768", context=1_024, vocab_size=50_257, compute_dtype="bfloat16"),
            HORIZONS,
            LearningRates(1e-3, 2**18, most=5),
        ),
    ),
    batch_tokens=BATCHES,
    decay_share=0.2,
    text="tfds:c4/en",
    tokenizer="gpt2",
    optimizer=OptimizerConfig(beta2_half_life_tokens=2e7),
    warmup_steps=50,
    eval_tokens=2**18,
    microbatch_tokens=4_096,  # 4 sequences, for the 85M model on a v5e chip; 16_384 on an H100
)
