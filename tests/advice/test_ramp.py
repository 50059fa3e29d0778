import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from scaling_jax.advice import Stage, cost, descent, goal, ramp
from scaling_jax.advice.advise import write_stages
from scaling_jax.io import UserError
from tests.advice.scan import fitted, fitted_free, local_b_crit

TARGET = 1.8


def loss_at(way, stages, tokens):
    """The loss that a schedule has come down to after so many tokens."""
    seen = [cost(way.until(k + 1), stages).tokens for k in range(0, len(way.losses), 20)]
    return float(np.interp(tokens, seen, way.losses[::20]))


@pytest.mark.parametrize("a", [1.0, 0.6, 0.8])
def test_a_constant_batch_comes_out_as_its_trade_off(a):
    """At a measured loss and between two, with trade-offs of any shape."""
    fit = fitted_free(a) if a != 1 else fitted()
    point = [p for p in fit.points if p.model == "model1"][-3]
    assert point.free_shape == (a != 1)
    for loss in (point.loss, TARGET):
        way, to = descent(fit, loss, "model1"), goal(fit, loss, "model1")
        for batch in (64, 1_024, 65_536):
            found = cost(way, (Stage(0, batch, 1.0),))
            assert found.steps == pytest.approx(float(to.steps(batch)), rel=1e-9)
            assert found.tokens == pytest.approx(float(to.tokens(batch)), rel=1e-9)
            if loss == point.loss:
                assert found.steps == pytest.approx(float(point.steps_at(batch)), rel=1e-9)


def test_stages_of_one_batch_are_that_constant_batch():
    way = descent(fitted(), TARGET)
    whole = cost(way, (Stage(0, 1_024, 1.0),))
    pieces = tuple(Stage(round(part * whole.tokens), 1_024, 1.0) for part in (0.0, 0.01, 0.3, 0.31, 0.9))
    assert cost(way, pieces) == pytest.approx(whole, rel=1e-9)


def test_a_switch_at_a_loss_takes_the_steps_of_each_batch_on_its_side():
    way = descent(fitted_free(0.6), TARGET)
    first = cost(way.until(800), (Stage(0, 512, 1.0),))
    found = cost(way, (Stage(0, 512, 1.0), Stage(round(first.tokens), 4_096, 1.0)))
    after = float(way.steps_at(4_096)[-1] - way.steps_at(4_096)[799])
    assert found.steps == pytest.approx(first.steps + after, rel=1e-3)
    assert found.tokens == pytest.approx(first.tokens + 4_096 * after, rel=1e-3)


def test_the_batch_doubles_when_the_local_b_crit_passes_twice_it_and_the_rate_grows_by_its_root():
    fit = fitted()
    stages = ramp(fit, TARGET, start_batch_tokens=256)
    way = descent(fit, TARGET)
    assert way.follows == "local"
    assert len(stages) > 3
    assert stages[0] == Stage(0, 256, 1.0)
    for before, after in itertools.pairwise(stages):
        assert after.tokens > before.tokens
        assert after.learning_rate_factor == pytest.approx(math.sqrt(after.batch_tokens / 256))
        assert (after.tokens - before.tokens) % before.batch_tokens == 0
        if before.tokens:  # the first change waits for the highest loss measured
            assert after.batch_tokens == 2 * before.batch_tokens
            reached = local_b_crit(loss_at(way, stages, after.tokens))
            assert reached == pytest.approx(2 * before.batch_tokens, rel=0.08)


def test_the_batch_to_follow_rises_through_noisy_windows_and_stays_beyond_them():
    fit = fitted(0.03)
    way = descent(fit, TARGET)
    assert (np.diff(way.b_crit) >= 0).all()
    windows = [p for p in fit.local.points if p.model == "model1" and p.shown]
    inside = (way.losses < windows[0].loss) & (way.losses > windows[-1].loss)
    np.testing.assert_allclose(way.b_crit[inside], local_b_crit(way.losses[inside]), rtol=0.35)
    assert np.unique(way.b_crit[way.losses > windows[0].loss]).size == 1


def test_without_a_local_fit_the_batch_follows_the_law_and_without_a_law_the_fits():
    fit = dataclasses.replace(fitted(), local=None)
    way = descent(fit, TARGET)
    assert way.follows == "law"
    np.testing.assert_allclose(way.b_crit, fit.law(way.losses))
    lawless = descent(dataclasses.replace(fit, law=None, errors=None), TARGET)
    assert lawless.follows == "fit"
    np.testing.assert_allclose(lawless.b_crit, way.b_crit, rtol=0.01)


def test_a_ramp_lies_between_the_constant_batches_that_it_starts_and_ends_with():
    fit = fitted()
    way, stages = descent(fit, TARGET), ramp(fit, TARGET, start_batch_tokens=256)
    ramped = cost(way, stages)
    small, large = (cost(way, (Stage(0, batch, 1.0),)) for batch in (256, stages[-1].batch_tokens))
    assert large.steps < ramped.steps < 0.6 * small.steps
    assert small.tokens < ramped.tokens < large.tokens


def test_a_batch_that_follows_the_root_of_the_noise_beats_the_constant_one_of_as_many_tokens():
    """McCandlish et al. 2018, appendix D: at fixed tokens, B ∝ √(dE_min/dS_min) takes the fewest steps."""
    fit = fitted()
    way, to = descent(fit, TARGET), goal(fit, TARGET)
    s_min = way.steps_at(1e12)
    noise = np.gradient(way.steps_at(1e-3) * 1e-3, s_min)  # dE_min/dS_min
    stages = (Stage(0, round(20 * noise[0] ** 0.5), 1.0),)
    for k in range(25, len(way.losses), 25):
        tokens = cost(way.until(k + 1), stages).tokens
        stages = (*stages, Stage(round(tokens), round(20 * noise[k] ** 0.5), 1.0))
    ramped = cost(way, stages)
    constant = to.b_crit * (ramped.tokens / to.e_min - 1)
    assert ramped.steps < 0.99 * float(to.steps(constant))


def test_a_lower_fraction_trades_steps_for_tokens():
    fit = fitted()
    way = descent(fit, TARGET)
    full, half = (cost(way, ramp(fit, TARGET, start_batch_tokens=64, fraction=f)) for f in (1.0, 0.5))
    assert full.steps < half.steps
    assert half.tokens < full.tokens


def test_a_ramp_stops_at_the_largest_batch():
    stages = ramp(fitted(), TARGET, start_batch_tokens=256, max_batch_tokens=2_100)
    assert [stage.batch_tokens for stage in stages] == [256, 1_024, 2_048]


def test_stages_survive_json(tmp_path):
    stages = ramp(fitted(), TARGET, start_batch_tokens=256)
    write_stages(tmp_path / "ramp.json", stages)
    read = json.loads((tmp_path / "ramp.json").read_text())
    assert tuple(Stage(**stage) for stage in read) == stages
    assert read == [dataclasses.asdict(stage) for stage in stages]
    with pytest.raises(UserError, match="no ramp"):
        write_stages(tmp_path / "none.json", ())
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (1.5, {"start_batch_tokens": 256}, "1.75 to 2.9"),
        (TARGET, {"start_batch_tokens": 0}, "a ramp from 0 to None"),
        (TARGET, {"start_batch_tokens": 512, "max_batch_tokens": 256}, "a ramp from 512 to 256"),
        (TARGET, {"start_batch_tokens": 512, "fraction": 0.0}, "the fraction positive"),
    ],
)
def test_impossible_ramps_are_refused(loss, options, message):
    with pytest.raises(UserError, match=message):
        ramp(fitted(), loss, **options)
