import math

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.results.branches import measure_branches
from scaling_jax.results.runs import read_runs
from scaling_jax.scanning.branches import EVALUATIONS, BranchPlan, plan_branches, run_branches
from scaling_jax.scanning.search import look_at
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig, Run
from scaling_jax.training.records import MetricsLine
from tests.made_up_scan import evaluated_lines, write_run

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
RUN = Run(MODEL, batch_tokens=64, learning_rate=1e-2, max_steps=1_000)
PLAN = BranchPlan(RUN, at_tokens=(5_000, 20_000), factors=(2, 4, 8), branch_steps=8)


def made_up(workdir, plan, b_crit, noise=0.0, diverges=()):
    """Branches lose 0.01 nats per factor of two above `b_crit(point)`, and nothing below; returns the runs by value."""
    draws = np.random.default_rng(0)
    every = plan.branch_tokens // EVALUATIONS
    trunk = []

    def line(step, tokens, batch, loss):
        ones = [1.0] * (every // batch)
        return MetricsLine.read(
            {"step": step, "tokens": tokens, "batch_tokens": batch, "small_batch_tokens": MODEL.context}
            | {"train_loss": ones, "small_sq_norm": ones, "big_sq_norm": ones, "test_loss": loss}
        )

    def base(tokens):
        return 4.0 * tokens**-0.05

    def train(run, branch_of):
        if branch_of is None:
            evaluations = range(every, run.max_tokens + 1, every)
            trunk.extend(line(at // run.batch_tokens, at, run.batch_tokens, base(at)) for at in evaluations)
            write_run(workdir, run, trunk, "exhausted")
            return
        point, batch = run.ramp[0].tokens, run.ramp[0].batch_tokens
        lines, status = [before for before in trunk if before.tokens <= point], "exhausted"
        for at in range(point + every, point + every * EVALUATIONS + 1, every):
            excess = 0.01 * max(0.0, math.log2(batch / b_crit(point))) + noise * draws.normal()
            status = "diverged" if batch in diverges else status
            loss = None if batch in diverges else base(at) + excess
            lines.append(line(lines[-1].step + every // batch, at, batch, loss))
        write_run(workdir, run, lines, status)

    run_branches(plan, train)
    return {record.run: record for record in read_runs(workdir)}


def test_branches_start_at_whole_steps_of_the_largest_batch_and_see_the_same_tokens():
    assert PLAN.points == (5_120, 19_968)
    assert PLAN.trunk.snapshot_tokens == PLAN.points
    for point in PLAN.points:
        for factor in PLAN.factors:
            branch = PLAN.branch(point, factor)
            assert branch.max_tokens == point + PLAN.branch_tokens
            assert (point + PLAN.branch_tokens) % branch.ramp[0].batch_tokens == 0
            assert branch.ramp[0].learning_rate_factor == pytest.approx(math.sqrt(factor))
    sgd = BranchPlan(Run(MODEL, 64, 1e-2, optimizer=OptimizerConfig("sgd"), max_steps=9), (5_000,), (2, 4), 8)
    assert sgd.branch(sgd.points[0], 4).ramp[0].learning_rate_factor == 4


def test_the_largest_batch_within_the_tolerance_is_found_between_those_tried(tmp_path):
    runs = made_up(tmp_path, PLAN, lambda point: 128.0 if point < 10_000 else 90.0)
    first, second = measure_branches([PLAN], runs, tolerance=0.01)
    assert first.b_crit == pytest.approx(256.0)  # one factor of two above 128 costs the tolerance
    assert second.b_crit == pytest.approx(180.0, rel=0.01)
    assert first.low == first.high == pytest.approx(256.0)
    assert first.tokens == 5_120
    assert 4 * (5_120 + PLAN.branch_tokens) ** -0.05 < first.loss < 4 * 5_120**-0.05


def test_noise_widens_the_interval_and_all_that_keep_up_leave_a_lower_bound(tmp_path):
    runs = made_up(tmp_path / "noisy", PLAN, lambda _: 128.0, noise=0.002)
    for found in measure_branches([PLAN], runs, tolerance=0.01):
        assert found.low < found.b_crit < found.high
    runs = made_up(tmp_path / "far", PLAN, lambda _: 1e6)
    assert [m.b_crit for m in measure_branches([PLAN], runs, tolerance=0.01)] == [math.inf, math.inf]


def test_a_branch_that_diverges_ends_the_range_below_it(tmp_path):
    runs = made_up(tmp_path, PLAN, lambda _: 1e6, diverges=(512,))
    assert [m.b_crit for m in measure_branches([PLAN], runs, tolerance=0.01)] == [256.0, 256.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": (4, 2)}, r"factors = \(4, 2\).* 2 or more"),
        ({"branch_steps": 12}, "branch_steps = 12 .*multiple of 8"),
        ({"at_tokens": ()}, "one or more points"),
    ],
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BranchPlan(**({"run": RUN, "at_tokens": (1_000,)} | options))


def test_branches_start_where_the_best_run_passed_its_targets(tmp_path):
    losses = np.geomspace(4, 2, 50).tolist()
    outcome = write_run(tmp_path, RUN, evaluated_lines(RUN, zip(range(10, 510, 10), losses, strict=True)), "exhausted")
    best = look_at((3.5, 3.0, 2.5, 2.2, 1.0), outcome)  # the last one wasn't reached
    plan = plan_branches(best, most_points=3, factors=(2,), branch_steps=8)
    passed = [10 + 10 * 49 * math.log(4 / loss) / math.log(2) for loss in (3.5, 2.5, 2.2)]
    assert plan.run == RUN
    assert plan.points == pytest.approx([64 * steps for steps in passed], abs=128)
    with pytest.raises(UserError, match=f"{RUN.run_id} reached no target"):
        plan_branches(look_at((1.0,), outcome))
