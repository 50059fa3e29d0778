import math

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.results.branches import measure_branches
from scaling_jax.scanning.branches import EVALUATIONS, BranchPlan, run_branches
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig, Run
from scaling_jax.training.records import append_metrics

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
RUN = Run(MODEL, batch_tokens=64, learning_rate=1e-2, max_steps=1_000)
PLAN = BranchPlan(RUN, at_tokens=(5_000, 20_000), factors=(2, 4, 8), branch_steps=8)


def made_up(workdir, plan, b_crit, noise=0.0, diverges=()):
    """Branches lose 0.01 nats per factor of two above `b_crit(point)`, and nothing below."""
    draws = np.random.default_rng(0)
    every = plan.branch_tokens // EVALUATIONS

    def write(run, tokens, loss):
        folder = workdir / "runs" / run.run_id
        folder.mkdir(parents=True, exist_ok=True)
        append_metrics(folder, {"step": 1, "tokens": int(tokens), "test_loss": loss})

    def base(tokens):
        return 4.0 * tokens**-0.05

    def train(run, branch_of):
        if branch_of is None:
            for tokens in range(every, run.max_tokens + 1, every):
                write(run, tokens, base(tokens))
            return
        point, batch = run.ramp[0].tokens, run.ramp[0].batch_tokens
        for k in range(1, EVALUATIONS + 1):
            excess = 0.01 * max(0.0, math.log2(batch / b_crit(point))) + noise * draws.normal()
            write(run, point + k * every, None if batch in diverges else base(point + k * every) + excess)

    run_branches(plan, train)


def test_branches_start_at_whole_steps_of_the_largest_batch_and_see_the_same_tokens():
    assert PLAN.points == (5_120, 19_968)
    assert PLAN.trunk.snapshot_tokens == PLAN.points
    for point in PLAN.points:
        for factor in PLAN.factors:
            branch = PLAN.branch(point, factor)
            assert branch.max_tokens == point + PLAN.branch_tokens
            assert (point + PLAN.branch_tokens) % branch.ramp[0].batch_tokens == 0
            assert branch.ramp[0].learning_rate_factor == pytest.approx(math.sqrt(factor))
    sgd = BranchPlan(Run(MODEL, 64, 1e-2, OptimizerConfig("sgd"), max_steps=9), (5_000,), (2, 4), 8)
    assert sgd.branch(sgd.points[0], 4).ramp[0].learning_rate_factor == 4


def test_the_largest_batch_within_the_tolerance_is_found_between_those_tried(tmp_path):
    made_up(tmp_path, PLAN, lambda point: 128.0 if point < 10_000 else 90.0)
    first, second = measure_branches(PLAN, tmp_path, tolerance=0.01)
    assert first.b_crit == pytest.approx(256.0)  # one factor of two above 128 costs the tolerance
    assert second.b_crit == pytest.approx(180.0, rel=0.01)
    assert first.low == first.high == pytest.approx(256.0)
    assert first.tokens == 5_120
    assert 4 * (5_120 + PLAN.branch_tokens) ** -0.05 < first.loss < 4 * 5_120**-0.05


def test_noise_widens_the_interval_and_all_that_keep_up_leave_a_lower_bound(tmp_path):
    made_up(tmp_path / "noisy", PLAN, lambda _: 128.0, noise=0.002)
    for found in measure_branches(PLAN, tmp_path / "noisy", tolerance=0.01):
        assert found.low < found.b_crit < found.high
    made_up(tmp_path / "far", PLAN, lambda _: 1e6)
    assert [m.b_crit for m in measure_branches(PLAN, tmp_path / "far", tolerance=0.01)] == [math.inf, math.inf]


def test_a_branch_that_diverges_ends_the_range_below_it(tmp_path):
    made_up(tmp_path, PLAN, lambda _: 1e6, diverges=(512,))
    assert [m.b_crit for m in measure_branches(PLAN, tmp_path, tolerance=0.01)] == [256.0, 256.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": (4, 2)}, "must grow from 2"),
        ({"branch_steps": 12}, "multiple of 8"),
        ({"at_tokens": ()}, "one or more points"),
    ],
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BranchPlan(**({"run": RUN, "at_tokens": (1_000,)} | options))
