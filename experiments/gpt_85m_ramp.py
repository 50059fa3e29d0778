"""Does a growing batch save steps at 85M parameters? Constant, by Kaplan et al.'s law, and by the live noise scale.

    scaling-jax compile experiments/gpt_85m_ramp.py --topology v6e:4x4        (needs no TPU)
    python experiments/gpt_85m_ramp.py

The 12×768 model of kaplan_3m_85m.py, on the same text, down to 3.2 nats per token. Four runs: constant batches of 2^16
and 2^18 tokens; a ramp from 2^16 that keeps the batch below half of B_crit = 2.1e8·L^-4.8 (arXiv 2001.08361, figure
10), with loss over steps by eq. 1.6 there; and a ramp whose batch doubles once the measured tr(Σ)/|G|² is sure to be
twice the doubled batch. Learning rates go with √B. AdamW, weight decay, clipping and bfloat16 as is usual for such a
model. batch_ramp.py is the same at a laptop's size, and was run. One of the four alone: `scaling-jax train` with this
file and --name 'ramp by the law'.

NOT RUN YET, on any machine. What to expect, and what it would cost, by the same two laws:

                                steps    tokens     FLOPs
    constant, 2^16 tokens     104,000     6.8e9    5.8e18
    constant, 2^18 tokens      32,000     8.4e9    7.2e18
    ramp by the law            43,000     7.8e9    6.7e18     ends at 2^18
    ramp by the noise scale   as by the law, where the noise scale is B_crit

2.6e19 FLOPs in all: about 90 chip-hours on v5e or 19 on H100s at 40 % of their peak. A batch of 2^16 tokens is 64
sequences: 16 chips take 4 each. A v5e chip needs microbatch_tokens=4_096.
"""

import dataclasses
from pathlib import Path

import numpy as np

from scaling_jax.advice import Descent, cost
from scaling_jax.data import prepare
from scaling_jax.fitting import published, steps_to_loss
from scaling_jax.tasks import model_config
from scaling_jax.training import LiveRamp, OptimizerConfig, Run, Stage, read_metrics, train
from scaling_jax.training.metrics import course

FRACTION = 0.5  # of B_crit
TARGET_LOSS = 3.2
WORKDIR = "results/gpt_85m_ramp"

BASE = Run(
    model=model_config("12x768", context=1_024, vocab_size=50_257, compute_dtype="bfloat16"),
    batch_tokens=2**16,
    learning_rate=5e-4,
    optimizer=OptimizerConfig(
        "adamw",
        beta1_half_life_tokens=1.7e6,  # β1 = 0.9 at 2^18 tokens
        beta2_half_life_tokens=2e7,  # β2 = 0.991 at 2^18
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    warmup_steps=400,
    text="tfds:c4/en",
    tokenizer="gpt2",
    target_loss=TARGET_LOSS,
    max_tokens=20_000_000_000,
    microbatch_tokens=2**14,
    eval_tokens=2**18,
    eval_growth=1.03,
)


def expected_descent() -> Descent:
    """L = (N_c/N)^0.077 + (S_c/S_min)^0.76, Kaplan et al. 2020, eq. 1.6 and table 3, and their B_crit(L)."""
    losses = np.geomspace(6.0, TARGET_LOSS, 2_000)
    s_min = 2.1e3 * (losses - (6.5e13 / BASE.model.num_params) ** 0.077) ** (-1 / 0.76)
    b_crit = published["kaplan2020"](losses)
    return Descent(losses, lambda batch_tokens: s_min * (1 + b_crit / batch_tokens), b_crit)


def stages_by_law() -> tuple[Stage, ...]:
    """The batch doubles when `FRACTION`·B_crit has passed the doubled one."""
    way, stages = expected_descent(), [Stage(0, BASE.batch_tokens)]
    while (k := int(np.searchsorted(FRACTION * way.b_crit, 2 * stages[-1].batch_tokens))) < len(way.losses):
        tokens = cost(way.until(k + 1), tuple(stages)).tokens
        batch = 2 * stages[-1].batch_tokens
        whole_steps = round((tokens - stages[-1].tokens) / stages[-1].batch_tokens)
        start = stages[-1].tokens + whole_steps * stages[-1].batch_tokens
        stages.append(Stage(start, batch, (batch / BASE.batch_tokens) ** 0.5))
    return tuple(stages)


RUNS = {
    "constant, 2^16 tokens": BASE,
    "constant, 2^18 tokens": dataclasses.replace(BASE, batch_tokens=2**18, learning_rate=2 * BASE.learning_rate),
    "ramp by the law": dataclasses.replace(BASE, ramp=stages_by_law()[1:]),
    "ramp by the noise scale": dataclasses.replace(
        BASE, live_ramp=LiveRamp(threshold=1 / FRACTION, max_batch_tokens=2**20, every_steps=200)
    ),
}


def main() -> None:
    corpus = prepare(BASE.text, BASE.model.context, BASE.tokenizer)
    print(f"{f'to a loss of {TARGET_LOSS}':26}{'steps':>10}{'tokens':>10}{'last batch':>14}")
    for name, run in RUNS.items():
        folder = Path(WORKDIR) / "runs" / train(run, WORKDIR, corpus=corpus).run_id
        lines = read_metrics(folder)
        evaluated = course(lines)
        steps = float(steps_to_loss(evaluated.eval_steps, evaluated.eval_losses, [TARGET_LOSS]).steps[0])
        tokens = np.interp(steps, [0] + [x.step for x in lines], [0] + [x.tokens for x in lines])
        print(f"{name:26}{steps:10.0f}{tokens:10.2e}{lines[-1].batch_tokens:14,}", flush=True)


if __name__ == "__main__":
    main()
