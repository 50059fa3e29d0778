import dataclasses
import math

import numpy as np
import pytest

from scaling_jax.io.config import to_dict
from scaling_jax.results.measurements import SeedSpread, measure_spread, seed_notes
from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.scanning.search import search
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import RunResult
from scaling_jax.training.records import append_metrics, write_json, write_result

TARGETS = (3.0, 2.5, 2.2)
EXPERIMENT = Experiment(
    name="two seeds",
    subjects=(Subject(ModelConfig(1, 16, 1), TARGETS, LearningRates(1e-2, 1_000, most=1)),),
    batch_tokens=(128, 256, 512),
    max_tokens=1_000_000,
    seeds=(0, 1),
)


def scan_with(workdir, slower: float) -> None:
    """Loss 4·step^−0.1; the second seed takes `slower` times the steps to every loss."""

    def train(run):
        folder = workdir / "runs" / run.run_id
        write_json(folder / "config.json", {"run": to_dict(run)})
        pace = slower if run.seed else 1.0
        steps = np.unique(np.geomspace(10, 2_000, 300).astype(int))
        for step in steps:
            append_metrics(folder, {"step": int(step), "test_loss": float(4 * (step / pace) ** -0.1)})
        result = RunResult(run.run_id, "reached", int(steps[-1]), int(steps[-1]) * run.batch_tokens, 1.9, "")
        write_result(folder, result)
        return result

    for group in EXPERIMENT.groups:
        search(EXPERIMENT, group, workdir, train)


def test_the_spread_between_seeds_is_that_of_their_steps_and_of_their_losses_at_one_step(tmp_path):
    scan_with(tmp_path, 1.5)
    spreads = measure_spread(EXPERIMENT, tmp_path)
    assert [(s.batch_tokens, s.target_loss, s.seeds) for s in spreads[:4]] == [
        (128, 3.0, 2),
        (128, 2.5, 2),
        (128, 2.2, 2),
        (256, 3.0, 2),
    ]
    for s in spreads:
        assert s.steps_spread == pytest.approx(math.log(1.5) / math.sqrt(2), rel=0.02)
        assert s.test_loss_std == pytest.approx(0.1 * s.target_loss * math.log(1.5) / math.sqrt(2), rel=0.05)


def test_seeds_that_lie_far_apart_are_noted_and_close_ones_are_not(tmp_path):
    scan_with(tmp_path / "far", 1.5)
    scan_with(tmp_path / "near", 1.05)
    (first, *_), near = (seed_notes(measure_spread(EXPERIMENT, tmp_path / which)) for which in ("far", "near"))
    assert "model 1x16 at 128 tokens: seeds differ by 33%" in first
    assert "3 losses" in first
    assert near == ()


def test_one_seed_has_no_spread(tmp_path):
    one = dataclasses.replace(EXPERIMENT, seeds=(0,))
    scan_with(tmp_path, 1.0)
    assert measure_spread(one, tmp_path) == []
    assert SeedSpread._fields[:3] == ("model", "batch_tokens", "target_loss")
