"""Plans of branches: which runs they are, and where they start and are evaluated."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.scanning.branches import EVALUATIONS, BranchPlan, plan_branches, run_branches
from scaling_jax.scanning.tried import look_at
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig, Run, Skip
from tests.made_up_scan import evaluated_lines, write_run

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
RUN = Run(MODEL, batch_tokens=64, learning_rate=1e-2, max_steps=1_000)
PLAN = BranchPlan(RUN, at_tokens=(5_000, 20_000), factors=(2, 4, 8), branch_steps=8)


def runs_of(plan):
    """All runs but the trunk."""
    trained = []
    run_branches(plan, lambda run, branch_of: trained.append((run, branch_of)))
    assert trained[0] == (plan.trunk, None)
    assert {branch_of for _, branch_of in trained[1:]} == {plan.trunk}
    return [run for run, _ in trained[1:]]


def test_branches_start_at_evaluations_and_see_the_same_tokens():
    assert PLAN.points == (5_120, 19_968)
    assert PLAN.trunk.snapshot_tokens == PLAN.points
    for point, factor, replicate in itertools.product(PLAN.points, PLAN.factors, range(PLAN.replicates)):
        branch = PLAN.branch(point, factor, replicate)
        assert branch.max_tokens == point + PLAN.branch_tokens
        assert branch.ramp[0].learning_rate_factor == pytest.approx(math.sqrt(factor))
    sgd = BranchPlan(Run(MODEL, 64, 1e-2, optimizer=OptimizerConfig("sgd"), max_steps=9), (5_000,), (2, 4), 8)
    assert sgd.branch(sgd.points[0], 4, 0).ramp[0].learning_rate_factor == 4


@pytest.mark.parametrize("factors", [(2, 4, 8, 16), (2, 3), (3, 4), (5,)])
@pytest.mark.parametrize("branch_steps", [8, 16, 24])
def test_the_run_and_every_branch_are_evaluated_at_the_same_tokens(factors, branch_steps):
    plan = BranchPlan(RUN, (5_000, 9_999, 20_000), factors, branch_steps)
    assert plan.branch_tokens >= branch_steps * factors[-1] * RUN.batch_tokens
    for point, factor in itertools.product(plan.points, (1, *factors)):
        evaluations = [point + k * plan.eval_tokens for k in range(1, EVALUATIONS + 1)]
        assert all(tokens % plan.eval_tokens == 0 for tokens in evaluations)  # then the run is evaluated there
        assert all((tokens - point) % (factor * RUN.batch_tokens) == 0 for tokens in evaluations)  # and a step ends


def test_replicates_start_from_one_state_and_read_text_of_their_own():
    runs = runs_of(PLAN)
    assert len(runs) + 1 == PLAN.num_runs == 1 + 2 * (4 * 4 - 1)
    assert sum(run.max_tokens - run.parted_at for run in runs) + PLAN.trunk.max_tokens == PLAN.num_tokens
    assert len({run.run_id for run in runs}) == len(runs)
    for point in PLAN.points:
        starts = [PLAN.branch(point, 2, replicate).text_read(point) for replicate in range(PLAN.replicates)]
        assert starts == [point + replicate * PLAN.branch_tokens for replicate in range(PLAN.replicates)]
        for replicate in range(1, PLAN.replicates):
            assert PLAN.continued(point, replicate).skip == PLAN.branch(point, 8, replicate).skip
            assert PLAN.continued(point, replicate).parted_at == point
    assert PLAN.continued(PLAN.points[0], 0) == PLAN.trunk


def test_betas_are_those_of_the_run_unless_half_lives_are_asked_for():
    point = PLAN.points[0]
    for betas, beta1 in (("run", 0.9), ("half-life", 0.9**8)):
        branch = dataclasses.replace(PLAN, betas=betas).branch(point, 8, 0)
        assert branch.at(branch.ramp[0]).optimizer.beta1 == pytest.approx(beta1)
    in_tokens = dataclasses.replace(RUN, optimizer=OptimizerConfig(beta1_half_life_tokens=640))
    branch = BranchPlan(in_tokens, (5_000,)).branch(4_096, 2, 0)
    assert branch.at(branch.ramp[0]).optimizer.beta1 == pytest.approx(0.5**0.1)


def test_branches_change_weight_decay_by_the_rule_of_their_run():
    adamw = dataclasses.replace(RUN, optimizer=OptimizerConfig("adamw", weight_decay=0.1))
    for rule, weight_decay in (("run", 0.1), ("sqrt", 0.1 * 8**0.5), ("timescale", 0.1 * 8**0.5)):
        plan = dataclasses.replace(PLAN, run=dataclasses.replace(adamw, weight_decay_rule=rule))
        branch = plan.branch(plan.points[0], 8, 0)
        assert branch.at(branch.ramp[0]).optimizer.weight_decay == pytest.approx(weight_decay)
        assert plan.trunk.optimizer.weight_decay == 0.1


def test_ids_of_version_0_1_are_those_of_the_first_replicate_with_half_lives():
    plan = BranchPlan(RUN, (5_000,), (2, 4, 8), 8, betas="half-life")
    assert plan.trunk.run_id == "1x16-b64-lr1.00e-2-s0-6e8ab1980374"
    assert plan.branch(5_120, 4, 0).run_id == "1x16-b64-lr1.00e-2-s0-ea98817e1a3d"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": (4, 2)}, r"factors = \(4, 2\).* 2 or more"),
        ({"branch_steps": 12}, "branch_steps = 12 .*multiple of 8"),
        ({"branch_steps": 0}, "branch_steps = 0 .*multiple of 8"),
        ({"at_tokens": ()}, "one or more points"),
        ({"replicates": 1}, "replicates = 1 .*2 or more"),
        ({"betas": "fixed"}, "betas = 'fixed'.*run"),
        ({"run": dataclasses.replace(RUN, skip=Skip(0, 16))}, "without a ramp or a skip"),
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
