"""Kaplan et al.'s critical batch size again: 3M and 85M parameters, GPT-2's tokens, batches of 2^14 … 2^21 tokens.

    scaling-jax compile experiments/kaplan_3m_85m.py --topology v5e:16x16        (needs no TPU)
    scaling-jax scan experiments/kaplan_3m_85m.py

Models of 4×256 and 12×768 with a context of 1,024, down to losses of 4.0 and 3.2 nats per token, as in figure 10 of
Kaplan et al. 2020 (arXiv 2001.08361); a learning-rate search at every batch size.

NOT RUN YET, on any machine; it compiles for TPUs. What it would cost, by that paper's own laws (S_min(L, N) of eq. 1.6
and B_crit = 2.1e8·L^-4.8, so S_min·(B + B_crit) tokens) with three learning rates at each batch size:

                            3M           85M
    FLOPs per token       1.1e8         8.5e8     of a training step, attention and unembedding included
    tokens               1.6e11        2.5e11     half of them at 2^20 and 2^21
    FLOPs                1.8e19        2.2e20
    steps, longest run     151k          394k     at 2^14
    v5e chip-hours          130           760     at 20 % and 40 % of the chips' peak
    v5p chip-hours           54           330
    H100-hours               25           150

Few sequences make a batch of 2^14 tokens: 16, which no more than 16 chips can share. Run small batches on small slices.

The text: WebText2 was never published. C4 (`tfds:c4/en`) is an open stand-in; TFDS prepares it from Common Crawl on a
cluster. Its files as JSON lines (allenai/c4 on the Hugging Face hub, renamed to .jsonl.gz) do as well:
text="files:~/c4/en/*.jsonl.gz#text"; so does OpenWebText, Skylion007/openwebtext there, which imitates the original.

Compare with 2.1e8·L^-4.8, 270k tokens at 4.0 and 790k at 3.2: we expect the same order of magnitude and an exponent
between -4 and -6. A loss on C4 isn't a loss on WebText2, even in the same tokens: another text's losses are shifted,
which bends the law and moves its constant, at this exponent by 5 % for each 1 % of loss.
"""

from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.tasks import model_config
from scaling_jax.training import OptimizerConfig

CONFIG = {"context": 1_024, "vocab_size": 50_257, "compute_dtype": "bfloat16"}

EXPERIMENT = Experiment(
    name="kaplan-3m-85m",
    subjects=(
        Subject(model_config("4x256", **CONFIG), log_spaced(6.0, 4.0, 16), LearningRates(4e-3, 2**18)),
        Subject(model_config("12x768", **CONFIG), log_spaced(5.5, 3.2, 16), LearningRates(1e-3, 2**18)),
    ),
    batch_tokens=powers_of_two(2**14, 2**21),
    max_tokens=48_000_000_000,
    text="tfds:c4/en",
    tokenizer="gpt2",
    optimizer=OptimizerConfig(beta2_half_life_tokens=2e7),  # 0.9994 at 2^14, 0.93 at 2^21
    warmup_steps=200,
    eval_tokens=2**18,
    microbatch_tokens=4_096,  # 4 sequences, for the 85M model on a v5e chip; 16_384 on an H100
)
