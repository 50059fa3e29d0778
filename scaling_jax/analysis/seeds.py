"""How far runs that differ in seed alone lie apart, and where that makes a crossing meaningless: seeds.csv."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.analysis.measurements import tried_runs
from scaling_jax.scanning import Experiment
from scaling_jax.scanning.search import best_at, evaluations
from scaling_jax.training import run_folder

MEANINGLESS = 0.25  # standard deviation of log steps between seeds from which a crossing says little


class SeedSpread(NamedTuple):
    """The best run of each seed at one target loss."""

    model: str
    batch_tokens: int
    target_loss: float  # nats per token
    seeds: int  # that reached it
    steps_spread: float  # standard deviation between seeds of log steps to the target
    test_loss_std: float  # of the test loss between seeds at their mean (geometric) step; nats per token


def measure_spread(experiment: Experiment, workdir: Path) -> list[SeedSpread]:
    """One row for each model, batch size and target loss that two seeds or more reached."""
    alike = defaultdict(list)
    for group in experiment.groups:
        alike[group.subject, group.batch_tokens].append(tried_runs(experiment, group, workdir))
    rows = []
    for (subject, batch_tokens), seeds in alike.items():
        for k, target in enumerate(subject.target_losses):
            best = [found for tried in seeds if (found := best_at(tried, k)) is not None]
            if len(best) < 2:
                continue
            log_steps = np.log([t.steps_to_target[k] for t in best])
            losses = [
                np.interp(log_steps.mean(), np.log(steps), losses)
                for steps, losses in (evaluations(run_folder(workdir, t.run)) for t in best)
            ]
            spread = float(log_steps.std(ddof=1)), float(np.std(losses, ddof=1))
            rows.append(SeedSpread(subject.model.name, batch_tokens, target, len(best), *spread))
    return rows


def seed_notes(spreads: Sequence[SeedSpread]) -> tuple[str, ...]:
    """Where seeds differ so much that a crossing means little."""
    notes = []
    for model, batch in dict.fromkeys((s.model, s.batch_tokens) for s in spreads):
        wide = [s for s in spreads if (s.model, s.batch_tokens) == (model, batch) and s.steps_spread > MEANINGLESS]
        if wide:
            worst = max(wide, key=lambda s: s.steps_spread)
            notes.append(
                f"model {model} at {batch:,} tokens: seeds differ by {math.expm1(worst.steps_spread):.0%} in steps "
                f"(±{worst.test_loss_std:.3f} nats) at loss {worst.target_loss:g}; its crossings at {len(wide)} losses "
                "mean little"
            )
    return tuple(notes)
