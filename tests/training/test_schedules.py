import dataclasses

import numpy as np
import optax
import pytest

from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict, to_dict
from scaling_jax.training import Run, Schedule, Stage, read_metrics, run_folder, train
from scaling_jax.training.journal import Call, position, rates_of_steps
from scaling_jax.training.metrics import MetricsLine
from tests.training.counting import CORPUS, RUN

HORIZON = 40 * RUN.batch_tokens
LIMITED = dataclasses.replace(RUN, max_steps=None, max_tokens=HORIZON)


def scheduled(form, **options):
    return dataclasses.replace(LIMITED, schedule=Schedule(form, HORIZON, **options))


@pytest.mark.parametrize(
    ("schedule", "of_optax"),
    [
        (Schedule("cosine", 1_000), optax.cosine_decay_schedule(1.0, 1_000)),
        (Schedule("cosine", 1_000, final_factor=0.1), optax.cosine_decay_schedule(1.0, 1_000, alpha=0.1)),
        (Schedule("linear", 1_000, final_factor=0.1), optax.linear_schedule(1.0, 0.1, 1_000)),
        (Schedule("wsd", 1_000), optax.linear_schedule(1.0, 0.0, 200, transition_begin=800)),
        (
            Schedule("wsd", 1_000, decay_share=0.5, decay_form="cosine"),
            optax.join_schedules([optax.constant_schedule(1.0), optax.cosine_decay_schedule(1.0, 500)], [500]),
        ),
    ],
)
def test_factors_are_those_of_optax(schedule, of_optax):
    tokens = np.arange(0, 1_001, 7)
    np.testing.assert_allclose(schedule.factor(tokens), [of_optax(n) for n in tokens], atol=1e-6)


def test_the_square_root_form_is_one_minus_the_root():
    schedule = Schedule("wsd", 1_000, decay_share=0.4, decay_form="sqrt")
    np.testing.assert_allclose(schedule.factor([0, 600, 700, 1_000, 2_000]), [1, 1, 0.5, 0, 0])


@pytest.mark.parametrize("form", ["cosine", "linear", "wsd"])
def test_the_rate_follows_tokens_through_a_ramp(form):
    run = dataclasses.replace(scheduled(form), ramp=(Stage(1_024, 256, 1.5),), betas="run")
    line = MetricsLine.read({
        "step": 8, "tokens": 1_024, "epoch": 0.1, "batch_tokens": 128, "small_batch_tokens": 64,
        "train_loss": [1.0] * 8, "small_sq_norm": [1.0] * 8, "big_sq_norm": [1.0] * 8,
    })  # fmt: skip
    rates = rates_of_steps(position(run, [line]), Call(3, True, False))
    np.testing.assert_allclose(rates, 1.5e-2 * run.schedule.factor([1_024, 1_280, 1_536]))


def test_a_constant_rate_is_the_same_number_at_every_step():
    assert (rates_of_steps(position(RUN, []), Call(5, False, False)) == RUN.learning_rate).all()


def test_steps_follow_the_schedule(tmp_path):
    """SGD on one device: each step moves the parameters by the scheduled rate times the gradient."""
    sgd = dataclasses.replace(LIMITED, optimizer=dataclasses.replace(RUN.optimizer, name="sgd"), warmup_steps=0)
    run = dataclasses.replace(sgd, schedule=Schedule("linear", HORIZON), learning_rate=0.05)
    losses = {}
    for name, one in {"scheduled": run, "constant": dataclasses.replace(run, schedule=None)}.items():
        train(one, tmp_path, corpus=CORPUS, num_devices=1)
        lines = read_metrics(run_folder(tmp_path, one))
        losses[name] = np.concatenate([line.train_loss for line in lines])
    first = losses["constant"][0] - losses["constant"][1], losses["scheduled"][0] - losses["scheduled"][1]
    assert losses["constant"][0] == losses["scheduled"][0]
    assert first[0] == first[1]  # the first step has the whole rate
    assert not np.array_equal(losses["constant"][2:], losses["scheduled"][2:])


def test_a_decay_from_a_trunk_is_the_run_made_for_its_horizon_bit_for_bit(tmp_path):
    whole = scheduled("wsd", decay_share=0.25)
    trunk = dataclasses.replace(LIMITED, snapshot_tokens=(whole.parted_at,), max_tokens=whole.parted_at)
    assert whole.parted_at == 30 * RUN.batch_tokens
    train(whole, tmp_path / "alone", corpus=CORPUS, num_devices=1)
    train(trunk, tmp_path / "branched", corpus=CORPUS, num_devices=1)
    train(whole, tmp_path / "branched", corpus=CORPUS, num_devices=1, branch_of=trunk)
    alone, branched = (
        np.concatenate([line.train_loss for line in read_metrics(run_folder(tmp_path / name, whole))])
        for name in ("alone", "branched")
    )
    np.testing.assert_array_equal(alone, branched)
    last = [read_metrics(run_folder(tmp_path / name, whole))[-1].test_loss for name in ("alone", "branched")]
    assert last[0] == last[1]


def test_a_run_with_a_schedule_is_a_record_and_one_without_keeps_its_id():
    run = scheduled("wsd", decay_form="sqrt")
    assert from_dict(Run, to_dict(run)) == run
    assert run.run_id != LIMITED.run_id
    assert LIMITED.run_id == dataclasses.replace(run, schedule=None).run_id
    assert run.without_limits.schedule == run.schedule


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "step"}, "schedule.form = 'step': choose from cosine, linear, wsd"),
        ({"decay_form": "exp"}, "schedule.decay_form = 'exp': choose from"),
        ({"horizon_tokens": 0}, "schedule.horizon_tokens = 0 must be positive"),
        ({"decay_share": 0.0}, "schedule.decay_share = 0.0 must be above 0"),
        ({"decay_share": float("nan")}, "schedule.decay_share = nan must be"),
        ({"final_factor": 1.0}, "schedule.final_factor = 1.0 must be"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        Schedule(**{"form": "wsd", "horizon_tokens": 1_000} | options)


def test_a_run_beyond_its_horizon_is_refused():
    with pytest.raises(UserError, match=r"max_tokens = 5,121 is beyond schedule.horizon_tokens = 5,120"):
        dataclasses.replace(scheduled("cosine"), max_tokens=HORIZON + 1)
