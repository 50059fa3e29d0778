"""The 3M half of kaplan_3m_85m.py, cut to an evening's patience: losses of 6 … 4.5, batches of 2^14 … 2^17 tokens.

    scaling-jax scan experiments/kaplan_small.py

Meant for 45 minutes on one H100, NOT RUN YET on any. By Kaplan et al.'s laws (arXiv 2001.08361, eq. 1.6 and figure 10)
the best learning rates need 2.3e9 tokens, the search at most three times that, 7e17 FLOPs: 45 minutes at 2.5 million
tokens a second, which is 28 % of an H100's peak. At half that speed it takes twice as long; it can be interrupted and
continued. Expect B_crit to rise from about 40k tokens at a loss of 6.0 to 150k at 4.5. That is beyond the largest batch
here, so the lowest losses may be flagged as one-sided: add 2^18 for another 20 minutes.

About the text, and the caveat that goes with it, see kaplan_3m_85m.py; a dozen of C4's 1,024 files are plenty.
"""

from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.tasks import model_config
from scaling_jax.training import OptimizerConfig

EXPERIMENT = Experiment(
    name="kaplan-small",
    subjects=(
        Subject(
            model_config("4x256", context=1_024, vocab_size=50_257, compute_dtype="bfloat16"),
            log_spaced(6.0, 4.5, 10),
            LearningRates(4e-3, 2**17, most=3),
        ),
    ),
    batch_tokens=powers_of_two(2**14, 2**17),
    max_tokens=1_500_000_000,
    text="files:~/c4/en/*.jsonl.gz#text",
    tokenizer="gpt2",
    optimizer=OptimizerConfig(beta2_half_life_tokens=2e7),
    warmup_steps=100,
    eval_tokens=2**17,
    microbatch_tokens=16_384,
)
