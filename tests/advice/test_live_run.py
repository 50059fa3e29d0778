"""Runs with planted noise scales, which grow with the tokens, give the planted batch at the horizon."""

import dataclasses
import math

import numpy as np
import pytest

from scaling_jax.advice.live_run import advise_run, growth_of, run_folder_of
from scaling_jax.io import UserError
from scaling_jax.results.runs import read_run
from scaling_jax.tasks import ModelConfig
from scaling_jax.training.metrics import MetricsLine
from scaling_jax.training.records import write_metrics, write_run_config
from scaling_jax.training.run import Run
from tests.made_up_scan import CORPUS

RUN = Run(
    model=ModelConfig(n_layer=1, d_model=16, n_head=1, context=16),
    batch_tokens=256,
    learning_rate=1e-2,
    max_tokens=10**9,
)
STEPS, SMALL = 4_000, 16


def write(folder, noise_of, spread=0.02, steps=STEPS, run=RUN, seed=0):
    """A run that still trains, with |G|² = 1 and tr(Σ) = `noise_of(tokens)`, both in tokens, times normal errors."""
    draws = np.random.default_rng(seed)
    lines = []
    for last in range(10, steps + 1, 10):
        tokens = run.batch_tokens * np.arange(last - 9, last + 1)
        noise = noise_of(tokens.astype(float))
        small, big = (1 + noise / SMALL), (1 + noise / run.batch_tokens)
        norms = [(x * draws.normal(1, spread, 10)).tolist() for x in (small, big)]
        values = {"step": last, "tokens": int(tokens[-1]), "batch_tokens": run.batch_tokens}
        values |= {"small_batch_tokens": SMALL, "train_loss": [3.0] * 10}
        lines.append(MetricsLine.read(values | dict(zip(("small_sq_norm", "big_sq_norm"), norms, strict=True))))
    folder.mkdir(parents=True)
    write_run_config(folder, run, CORPUS)
    write_metrics(folder, lines)
    return folder


def growing(tokens):
    return 2_000 * (tokens / 1e6) ** 0.47


def b_crit(least, exponent=0.47):
    """The trade-off whose local B_crit dE_min/dS_min is the noise scale."""
    return (1 - exponent) * 2_000 * (least / 1e6) ** exponent


def test_the_local_b_crit_of_a_power_of_the_data_is_the_whole_one_over_one_minus_the_power():
    least = np.array([1e6, 1.0001e6])
    fewest_steps = least / b_crit(least)
    local = np.diff(least) / np.diff(fewest_steps)
    assert local[0] == pytest.approx(growing(least).mean(), rel=1e-4)


def test_a_run_with_a_small_batch_gives_the_planted_batch_at_its_horizon(tmp_path):
    """Of a small batch, hardly more than the fewest tokens are needed, so its tokens are D_min."""
    run = dataclasses.replace(RUN, batch_tokens=32)
    folder = write(tmp_path / "run", growing, spread=1e-3, steps=20_000, run=run)
    advice = advise_run(folder, 1e8, weight_decay=0.1)
    assert advice.quantity == "B_crit"
    assert advice.batch == pytest.approx(b_crit(1e8 / 2), rel=0.05)
    assert advice.interval[0] < b_crit(1e8 / 2) < advice.interval[1]
    assert advice.outside == pytest.approx(1e8 / (20_000 * 32))
    for row in advice.rows:
        assert row.steps == 1e8 / row.batch_tokens
        assert row.learning_rate == pytest.approx(1e-2 * math.sqrt(row.batch_tokens / 32))
        timescale = row.batch_tokens / (row.learning_rate * row.weight_decay * 1e8)
        assert timescale == pytest.approx(32 / (1e-2 * 0.1 * run.max_tokens))
    lost = {row.batch_tokens: row.cost for row in advice.rows}
    assert list(lost.values()) == sorted(lost.values())
    assert min(abs(cost - 0.5) for cost in lost.values()) < 0.1
    assert {law.key for law in advice.published} == {"bergsma2025-crit"}


def test_the_interval_holds_the_planted_batch_in_most_runs_and_widens_with_the_horizon(tmp_path):
    """The exponent's range makes it wider than the noise scale's own 95 %."""
    held, run = 0, dataclasses.replace(RUN, batch_tokens=32)
    for seed in range(20):
        folder = write(tmp_path / str(seed), growing, spread=0.02, run=run, seed=seed)
        near, far = advise_run(folder, 2e6), advise_run(folder, 2e9)
        held += near.interval[0] < b_crit(1e6) < near.interval[1]
        assert far.interval[1] / far.interval[0] > 1.3 * near.interval[1] / near.interval[0]
    assert held >= 18


def test_the_runs_own_growth_is_told(tmp_path):
    growth = growth_of(read_run(write(tmp_path / "run", lambda tokens: 500 * (tokens / 1e6) ** 0.8, spread=0.01)))
    assert growth.low < 0.8 < growth.high
    assert growth.high - growth.low < 0.2
    notes = advise_run(tmp_path / "run", 1e8).notes
    assert any(f"D^{growth.exponent:.2f}" in note for note in notes)


def test_what_a_run_cannot_answer_is_refused_in_a_line(tmp_path):
    few = write(tmp_path / "few", growing, steps=10)
    with pytest.raises(UserError, match=r"too few steps for a noise scale \(10\): train it longer"):
        advise_run(few, 1e9)
    noisy = write(tmp_path / "noisy", lambda tokens: 1e7 + 0 * tokens, spread=0.5, steps=100)
    with pytest.raises(UserError, match="isn't resolved"):
        advise_run(noisy, 1e9)
    run = write(tmp_path / "run", growing, steps=1_000)
    for wrong, says in (({"tokens": 0.0}, "--tokens"), ({"tokens": 1e9, "model": "x"}, "a run of 1x16, not of x")):
        with pytest.raises(UserError, match=says):
            advise_run(run, **wrong)


def test_a_folder_of_one_run_stands_for_the_run(tmp_path):
    first = write(tmp_path / "runs" / "a", growing, steps=1_000)
    assert run_folder_of(tmp_path) == run_folder_of(first) == first
    write(tmp_path / "runs" / "b", growing, steps=1_000)
    with pytest.raises(UserError, match=r"holds 2 runs: give the folder of one of them, such as .*a$"):
        run_folder_of(tmp_path)
    (tmp_path / "experiment.json").write_text("{}")
    assert run_folder_of(tmp_path) is None  # a scan
    assert run_folder_of(tmp_path / "mine.csv") is None
