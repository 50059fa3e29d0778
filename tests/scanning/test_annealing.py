import dataclasses

import pytest

from scaling_jax.io import UserError
from scaling_jax.scanning.annealing import AnnealedLoss, AnnealingPlan, log_horizons, train_annealed
from scaling_jax.training import Stage, read_result, run_folder, train
from tests.training.counting import CORPUS, RUN

PLAN = AnnealingPlan(RUN, (2_600, 3_840, 5_120), decay_share=0.25)


def test_horizons_are_evenly_spaced_in_logs():
    assert log_horizons(1_000, 4_000) == (1_000, 1_414, 2_000, 2_828, 4_000)
    assert log_horizons(1_000, 3_900, per_doubling=1) == (1_000, 2_000)
    assert log_horizons(1_024, 4_096, largest_batch=512) == (1_024, 1_536, 2_048, 3_072, 4_096)
    assert log_horizons(1_024, 2_048, largest_batch=2_048) == (2_048,)


def test_the_cost_is_the_trunk_and_the_decays():
    starts, ends = [1_920, 2_816, 3_840], [2_560, 3_840, 5_120]
    assert [run.max_tokens for run in PLAN.annealed] == ends
    assert PLAN.trunk.snapshot_tokens == tuple(starts)
    assert PLAN.num_tokens == 3_840 + sum(b - a for a, b in zip(starts, ends, strict=True))
    many = AnnealingPlan(dataclasses.replace(RUN, batch_tokens=32), log_horizons(2**14, 2**21))
    assert 1.15 < many.num_tokens / 2**21 < 1.3


def test_one_trunk_gives_the_losses_of_whole_runs(tmp_path):
    losses = train_annealed(PLAN, tmp_path / "annealed", corpus=CORPUS, num_devices=1)
    assert [row[:3] for row in losses] == [("1x16", 128, 2_560), ("1x16", 128, 3_840), ("1x16", 128, 5_120)]
    assert losses[0].learning_rate == RUN.learning_rate
    whole = PLAN.annealed[1]
    train(whole, tmp_path / "alone", corpus=CORPUS, num_devices=1)
    assert read_result(run_folder(tmp_path / "alone", whole)).test_loss == losses[1].loss
    trunk = read_result(run_folder(tmp_path / "annealed", PLAN.trunk))
    assert trunk.test_loss > losses[2].loss  # the decay helps
    again = train_annealed(PLAN, tmp_path / "annealed", corpus=CORPUS, num_devices=1)
    assert again == losses


def test_a_trunk_that_diverges_has_no_annealed_losses(tmp_path):
    run = dataclasses.replace(RUN, learning_rate=1e30)
    assert train_annealed(AnnealingPlan(run, (5_120,)), tmp_path, corpus=CORPUS, num_devices=1) == []


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"run": dataclasses.replace(RUN, ramp=(Stage(1_024, 256),))}, "constant batch size and learning rate"),
        ({"horizons": ()}, "one or more"),
        ({"horizons": (2_000, 1_000)}, "increase"),
        ({"horizons": (1_000,)}, "less than two steps of 128 tokens: use longer horizons or smaller batches"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(PLAN, **plan)


def test_a_row_is_what_fits_read():
    assert AnnealedLoss._fields == ("model", "batch_tokens", "tokens", "loss", "learning_rate", "seed")
