"""Does Muon keep its token efficiency at larger batches than AdamW? Six batch sizes, the demo's larger model.

    scaling-jax scan experiments/muon.py
    scaling-jax scan experiments/muon.py --set optimizer.name=muon name=muon
    scaling-jax compare results/adamw results/muon

Shah et al. 2025, "Practical efficiency of Muon for pretraining" (arXiv 2505.02222), found that the ratio of AdamW's
tokens to Muon's, to the same loss, doesn't fall as the batch grows, far beyond AdamW's critical batch size. It doesn't
here either: to 2.1 nats, Muon saves 58 % [52 %, 64 %] of the tokens at 512 tokens a batch, 72 % [68 %, 76 %] at 8,192,
and 66 % [60 %, 70 %] at 16,384, over the demo's runs with Adam (experiments/results/muon). Muon's scan took 20 minutes
on one busy core.
"""

from scaling_jax import Experiment, LearningRates, OptimizerConfig, Subject, log_spaced, model_config, powers_of_two

EXPERIMENT = Experiment(
    name="adamw",
    subjects=(
        Subject(
            model_config("2x64"),
            log_spaced(2.35, 2.1, 6),
            LearningRates(3e-3, 512, places=2, most=8, catch_up=0.15),
        ),
    ),
    batch_tokens=powers_of_two(512, 16_384),
    max_tokens=6_000_000,
    optimizer=OptimizerConfig("adamw", weight_decay=0.1),
)
