"""The tracker in the training state against averages of the raw series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import noisy_quadratic as quadratic
from scaling_jax.noise_scale import Moments, ema, tracker, unbiased, value_and_grad


def moments_series(steps, runs=()):
    small, big = 5 + jax.random.uniform(jax.random.key(0), (2, steps, *runs))
    return Moments(small + 1, big, jnp.full(small.shape, 2.0), jnp.full(small.shape, 8.0))


def follow(track, series, like=0.0):
    return jax.lax.scan(lambda state, m: (track.update(m, state), None), track.init(like), series)[0]


def test_reads_the_debiased_average_of_the_raw_moments():
    series = moments_series(30)
    track = tracker(half_life=5)
    grad_sq_norm, trace_cov = track.read(follow(track, series))
    g2, tr = unbiased(series)
    np.testing.assert_allclose(grad_sq_norm, ema(g2, 5)[-1], rtol=1e-4)
    np.testing.assert_allclose(trace_cov, ema(tr, 5)[-1], rtol=1e-4)


def test_a_bad_step_is_flagged_and_changes_nothing_else():
    series = moments_series(10)
    track = tracker(half_life=5)
    with jax.debug_nans(False):
        bad = series._replace(small_sq_norm=series.small_sq_norm.at[4].set(jnp.nan).at[5].set(jnp.inf))
        got = follow(track, bad)
    want = follow(track, jax.tree.map(lambda x: jnp.delete(x, jnp.array([4, 5])), series))
    assert (got.flagged_steps, got.steps) == (2, 8)
    jax.tree.map(np.testing.assert_array_equal, got._replace(flagged_steps=0), want._replace(flagged_steps=0))


def test_groups_and_a_population_of_runs():
    track = tracker(half_life=5)
    fn = value_and_grad(quadratic.loss, num_microbatches=2, groups=str)
    x = quadratic.draw(jax.random.key(0), 24).reshape(3, 8, quadratic.ROWS, quadratic.COLUMNS)
    (_, moments), _ = jax.vmap(fn, in_axes=(None, 0))(quadratic.PARAMS, x)
    state = jax.vmap(lambda m: track.update(m, track.init({"norm": 0.0})))(moments)
    jax.tree.map(np.testing.assert_allclose, track.read(state), jax.vmap(unbiased)(moments))


def test_state_is_arrays_only_and_reads_zero_before_the_first_step():
    track = tracker(half_life=5)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(track.init()))
    assert track.read(track.init()) == (0, 0)
    with pytest.raises(ValueError, match="half_life=0"):
        tracker(0)
