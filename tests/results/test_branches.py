"""Branches measured from their runs, and branches.csv."""

import dataclasses
import math
import shutil

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.results import analyse, read_results
from scaling_jax.results.branches import (
    branched_in,
    find_branches,
    measure_branches,
    planned,
    read_branches,
    write_branches,
)
from scaling_jax.results.runs import read_runs
from scaling_jax.scanning.branches import BranchPlan, run_branches
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Run
from scaling_jax.training.metrics import MetricsLine
from tests.made_up_scan import write_run

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
RUN = Run(MODEL, batch_tokens=64, learning_rate=1e-2, max_steps=1_000)
PLAN = BranchPlan(RUN, at_tokens=(5_000, 20_000), factors=(2, 4, 8), branch_steps=8)
TOLERANCE = 0.01


def made_up(workdir, plan, b_crit, noise=0.0, text=0.0, diverges=()):
    """Branches lose 0.01 nats per factor of two above `b_crit(point)`, and nothing below; returns the folder's runs.

    Args:
      noise: of each replicate of a branch, nats per token.
      text: of all that read the same text.
      diverges: batch sizes of branches whose last replicate diverges.
    """
    draws = np.random.default_rng(0)
    every = plan.eval_tokens
    trunk = []

    def line(before, tokens, batch, loss):
        step, at = (before[-1].step, before[-1].tokens) if before else (0, 0)
        ones = [1.0] * ((tokens - at) // batch)
        return MetricsLine.read(
            {"step": step + len(ones), "tokens": tokens, "batch_tokens": batch, "small_batch_tokens": MODEL.context}
            | {"train_loss": ones, "small_sq_norm": ones, "big_sq_norm": ones, "test_loss": loss}
        )

    def base(tokens):
        return 4.0 * tokens**-0.05

    def train(run, branch_of):
        if branch_of is None:
            for at in range(every, run.max_tokens + 1, every):
                trunk.append(line(trunk, at, run.batch_tokens, base(at)))
            write_run(workdir, run, trunk, "exhausted")
            return
        point, batch = run.parted_at, run.ramp[0].batch_tokens if run.ramp else run.batch_tokens
        replicate = run.skip.tokens // plan.branch_tokens if run.skip else 0
        lines, status = [before for before in trunk if before.tokens <= point], "exhausted"
        shift = 0.01 * max(0.0, math.log2(batch / b_crit(point))) + (noise * draws.normal() if run.ramp else 0.0)
        shift += text * math.sin(replicate * point)
        for at in range(point + every, point + plan.branch_tokens + 1, every):
            lines.append(line(lines, at, batch, base(at) + shift))
        if run.ramp and batch in diverges and replicate == plan.replicates - 1:
            lines[-1], status = line(lines[:-1], lines[-1].tokens, batch, None), "diverged"
        write_run(workdir, run, lines, status)

    run_branches(plan, train)
    return read_runs(workdir)


def measured(plan, records, tolerance=TOLERANCE):
    return measure_branches(planned([plan], {record.run: record for record in records}), tolerance)


def test_the_largest_batch_within_the_tolerance_is_found_between_those_tried(tmp_path):
    first, second = measured(PLAN, made_up(tmp_path, PLAN, lambda point: 128.0 if point < 10_000 else 90.0))
    assert first.b_crit == pytest.approx(256.0)  # one factor of two above 128 costs the tolerance
    assert second.b_crit == pytest.approx(180.0, rel=0.01)
    assert (first.low, first.high) == pytest.approx((256.0, 256.0))
    assert (first.tokens, first.replicates, first.tolerance, first.betas) == (5_120, 4, TOLERANCE, "run")
    assert 4 * (5_120 + PLAN.branch_tokens) ** -0.05 < first.loss < 4 * 5_120**-0.05


def test_text_that_run_and_branch_share_costs_no_precision_and_noise_of_replicates_does(tmp_path):
    for found in measured(PLAN, made_up(tmp_path / "text", PLAN, lambda _: 128.0, text=0.1)):
        assert (found.low, found.b_crit, found.high) == pytest.approx((256.0,) * 3)
    for found in measured(PLAN, made_up(tmp_path / "noisy", PLAN, lambda _: 128.0, noise=0.002)):
        assert found.low < 0.99 * found.b_crit < 0.98 * found.high


def test_all_that_keep_up_leave_the_largest_batch_as_a_lower_bound(tmp_path):
    for found in measured(PLAN, made_up(tmp_path, PLAN, lambda _: 1e6)):
        assert (found.b_crit, found.low, found.high) == (math.inf, 512.0, math.inf)


def test_a_replicate_that_diverges_bounds_b_crit_by_its_batch(tmp_path):
    for found in measured(PLAN, made_up(tmp_path, PLAN, lambda _: 1e6, diverges=(512,))):
        assert (found.b_crit, found.low, found.high) == (256.0, 256.0, 512.0)


@pytest.mark.parametrize("betas", ["run", "half-life"])
def test_a_folder_alone_gives_what_its_plan_gives(betas, tmp_path):
    plan = dataclasses.replace(PLAN, betas=betas, replicates=3)
    records = made_up(tmp_path, plan, lambda _: 128.0, noise=0.002)
    assert measure_branches(branched_in(records), TOLERANCE) == measured(plan, records)


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = measured(PLAN, made_up(tmp_path, PLAN, lambda point: 128.0 if point < 10_000 else 1e6))
    write_branches(tmp_path, rows)
    for row, written in zip(read_branches(tmp_path), rows, strict=True):
        assert row == pytest.approx(written)


OLD = "model,batch_tokens,seed,tokens,loss,b_crit,low,high\n"
GOOD, NOTHING = "1x16,64,0,5120,2.6,256,200,300\n", "1x16,64,0,22528,2.7,64,64,64\n"
EMPTY = "1x16,64,0,34816,,64,64,64\n"


def test_a_table_of_version_0_1_is_read_with_what_it_meant(tmp_path):
    (tmp_path / "branches.csv").write_text(OLD + GOOD)
    (row,), notes = find_branches(tmp_path, ())
    assert row[:8] == ("1x16", 64, 0, 5_120, 2.6, 256.0, 200.0, 300.0)
    assert (row.replicates, row.betas) == (1, "half-life")
    assert not notes


@pytest.mark.parametrize(
    "damage", [OLD + GOOD + NOTHING, OLD + GOOD + EMPTY, "model,loss\n1x16,2.6\n", "\x00", "a\udcff"]
)
def test_a_damaged_table_is_measured_again_from_the_runs(damage, tmp_path):
    records = made_up(tmp_path, PLAN, lambda _: 128.0, noise=0.002)
    (tmp_path / "branches.csv").write_bytes(damage.encode("utf-8", "surrogateescape"))
    found = read_results(tmp_path)
    assert list(found.branches) == measured(PLAN, records)
    (note,) = found.notes
    assert "branches.csv" in note
    assert "0.01" in note


@pytest.mark.parametrize(("damage", "kept"), [(GOOD + NOTHING, 1), (EMPTY + GOOD, 1), (NOTHING, 0)])
def test_without_runs_damaged_lines_are_left_out_with_one_note(damage, kept, made_up, tmp_path):
    """A fit of the folder isn't refused, and says so."""
    shutil.copytree(made_up[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "branches.csv").write_text(OLD + damage)
    told = analyse(tmp_path)
    assert len(told.branches) == kept
    (note,) = [note for note in told.notes if "branches.csv" in note]
    assert "left out (1)" in note


def test_the_tolerance_must_be_positive():
    with pytest.raises(UserError, match=r"tolerance = 0\.0"):
        measure_branches([], 0.0)
