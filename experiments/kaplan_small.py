"""Does B_crit ∝ L^-4.8 (Kaplan et al. 2020, arXiv 2001.08361) show in 3M parameters, on text that a laptop can carry?

    benchmarks/accelerator/pack.sh && benchmarks/accelerator/run.sh OUT --stages kaplan --minutes 60

or, with the text that pack.sh made in the current folder, `scaling-jax scan experiments/kaplan_small.py`.

The 3M half of kaplan_3m_85m.py on C sources of the Linux kernel: some 40 million tokens of GPT-2's vocabulary, 1,024
tokens of context, batches of 2^13 … 2^18 tokens. Such text is easier than Kaplan et al.'s, so its losses are lower, and
B_* isn't theirs; the exponent may be. On an H100 it trains about 2 million tokens a second. So far one run was trained
to its end (docs/performance.md), so there is no result yet. The scan's stage in benchmarks/accelerator continues from
the finished runs that the last one left.
"""

from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.tasks import model_config
from scaling_jax.training import OptimizerConfig

EXPERIMENT = Experiment(
    name="kaplan-small",
    subjects=(
        Subject(
            model_config("4x256", context=1_024, vocab_size=50_257, compute_dtype="bfloat16"),
            log_spaced(5.0, 2.5, 13),
            LearningRates(4e-3, 2**17, most=4),
        ),
    ),
    batch_tokens=powers_of_two(2**13, 2**18),
    max_tokens=60_000_000,
    text="files:kernel.jsonl.zst#text",
    tokenizer="gpt2",
    optimizer=OptimizerConfig(beta2_half_life_tokens=2e7),
    eval_tokens=2**17,
    microbatch_tokens=16_384,
)
