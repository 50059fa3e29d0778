"""One late switch: where it lies by closed forms, and that it beats other schedules of the same two batches."""

import math

import numpy as np
import pytest
from scipy import optimize

from scaling_jax.advice import Stage, cost, descent, late_switch
from scaling_jax.io import UserError
from tests.advice.scan import b_crit, fitted, fitted_free, local_b_crit, s_min

TARGET, SMALL, LARGE = 1.8, 512, 8_192


def switched(extra_tokens, fit=None):
    return late_switch(
        fit or fitted(), TARGET, start_batch_tokens=SMALL, max_batch_tokens=LARGE, extra_tokens=extra_tokens
    )


def tokens_of_small(loss):
    """b·S of the hyperbola."""
    return s_min(loss) * (SMALL + b_crit(loss))


@pytest.mark.parametrize("extra_tokens", [0.02, 0.1, 0.3])
def test_the_switch_lies_where_the_least_steps_left_use_up_the_extra_tokens(extra_tokens):
    """(B − b)·(S_min(L*) − S_min(L_s)) = share of the small batch's tokens."""
    least_left = extra_tokens * tokens_of_small(TARGET) / (LARGE - SMALL)
    at = optimize.brentq(lambda loss: s_min(TARGET) - s_min(loss) - least_left, TARGET, 2.8)
    first, second = switched(extra_tokens)
    assert first == Stage(0, SMALL, 1.0)
    assert second.batch_tokens == LARGE
    assert second.learning_rate_factor == pytest.approx(math.sqrt(LARGE / SMALL))
    assert second.tokens % SMALL == 0
    assert second.tokens == pytest.approx(tokens_of_small(at), rel=0.01)


@pytest.mark.parametrize("a", [1.0, 0.7])
def test_it_takes_the_tokens_that_it_may_with_trade_offs_of_any_shape(a):
    fit = fitted() if a == 1 else fitted_free(a)
    way = descent(fit, TARGET)
    alone, found = cost(way, (Stage(0, SMALL),)), cost(way, switched(0.1, fit))
    assert found.tokens == pytest.approx(1.1 * alone.tokens, rel=2e-3)
    assert found.steps < alone.steps


def test_it_saves_the_steps_that_the_noise_after_the_switch_costs_the_small_batch():
    """(1/b − 1/B)·(E_min(L*) − E_min(L_s)), so each saved step costs b·B over a B_crit of after the switch."""
    way = descent(fitted(), TARGET)
    first, second = switched(0.1)
    alone, found = cost(way, (first,)), cost(way, (first, second))
    at = optimize.brentq(lambda loss: tokens_of_small(loss) - second.tokens, TARGET, 2.8)
    noise = s_min(TARGET) * b_crit(TARGET) - s_min(at) * b_crit(at)
    assert alone.steps - found.steps == pytest.approx((1 / SMALL - 1 / LARGE) * noise, rel=0.01)
    price = (found.tokens - alone.tokens) / (alone.steps - found.steps)
    assert SMALL * LARGE / local_b_crit(TARGET) < price < SMALL * LARGE / local_b_crit(at)


def test_no_other_schedule_of_the_two_batches_and_as_many_tokens_takes_fewer_steps():
    """Large batches first, or in between, cost more where B_crit is small."""
    way = descent(fitted(), TARGET)
    late = cost(way, switched(0.1))
    least_left = 0.1 * tokens_of_small(TARGET) / (LARGE - SMALL)
    least = way.steps_at(1e12)
    seen = []
    for start in range(0, 1_600, 200):
        end = int(np.searchsorted(least, least[start] + least_left))
        if end >= len(least) or start == 0:
            continue
        into = cost(way.until(start + 1), (Stage(0, SMALL),)).tokens
        out = into + LARGE * float(way.steps_at(LARGE)[end] - way.steps_at(LARGE)[start])
        other = cost(way, (Stage(0, SMALL), Stage(round(into), LARGE), Stage(round(out), SMALL)))
        assert other.tokens == pytest.approx(late.tokens, rel=5e-3)
        seen.append(other.steps)
    assert len(seen) > 3
    assert late.steps < min(seen)
    assert seen == sorted(seen, reverse=True)  # the later the better


def test_more_extra_tokens_switch_earlier_and_none_never():
    starts = [switched(extra)[1].tokens for extra in (0.02, 0.1, 0.3, 1.0)]
    assert starts == sorted(starts, reverse=True)
    assert switched(0.0) == (Stage(0, SMALL),)
    highest = descent(fitted(), TARGET).losses[0]
    assert switched(1e6)[1].tokens == pytest.approx(tokens_of_small(highest), abs=2 * SMALL)  # nothing measured before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_batch_tokens": 512, "max_batch_tokens": 512}, "512 to 512 .*larger"),
        ({"start_batch_tokens": 512, "max_batch_tokens": 1_024, "extra_tokens": -0.1}, "-0.1 .*0 or more"),
        ({"start_batch_tokens": 512, "max_batch_tokens": 1_024, "extra_tokens": math.nan}, "nan"),
    ],
)
def test_what_is_no_late_switch_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        late_switch(fitted(), TARGET, **options)
