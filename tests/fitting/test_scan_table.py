"""Sums over the runs of a scan: equal to those of dense matrices, in memory and time that grow with the table."""

import tracemalloc

import numpy as np
import pytest

from scaling_jax.fitting.resampling import degrees_of_freedom, forms_of_variance, variance_of
from scaling_jax.fitting.scan_table import covariance_of, scan_table


def a_table(num_models, num_batches, num_losses, num_seeds, own_losses=True):
    """A table whose models have losses of their own, unless told otherwise; some runs missed their last loss."""
    m, b, s, t = np.indices((num_models, num_batches, num_seeds, num_losses)).reshape(4, -1)
    loss = np.geomspace(3.0, 2.0, num_losses)[t] * (1 + 1e-3 * m * own_losses)
    steps = np.where((t == num_losses - 1) & (b == 0), np.nan, 100.0 * (t + 1) * (1 + 2.0**-b))
    return scan_table(np.char.add("m", m.astype(str)), 256.0 * 2**b, loss, steps, s)


def by_run(table, values):
    """`values` `[G, n]` as `[R, T]`."""
    dense = np.zeros((table.run_index.max() + 1, table.target_index.max() + 1))
    g, i = np.nonzero(table.mask)
    dense[table.run_index[g, i], table.target_index[g]] = values[g, i]
    return dense


@pytest.mark.parametrize("own_losses", [True, False])
def test_sums_over_runs_are_those_of_dense_matrices(own_losses):
    table = a_table(3, 4, 5, 2, own_losses)
    draws = np.random.default_rng(0)
    slopes = table.mask * draws.normal(size=table.mask.shape)
    slopes -= table.mask * slopes.sum(-1, keepdims=True) / table.mask.sum(-1, keepdims=True)
    errors, *influence = table.mask * draws.normal(size=(3, *table.mask.shape))

    num_runs, num_targets = by_run(table, errors).shape
    left = np.zeros((num_targets, num_runs, num_runs))
    for g, t in enumerate(table.target_index):
        runs, slope = table.run_index[g, table.mask[g]], slopes[g, table.mask[g]]
        left[t][np.ix_(runs, runs)] += np.eye(len(runs)) - 1 / len(runs) - np.outer(slope, slope) / (slope @ slope)
    freedom = np.einsum("trs,urs->tu", left, left)
    np.testing.assert_allclose(degrees_of_freedom(table, slopes), freedom, atol=1e-12)

    errors_RxT, influence_RxT = by_run(table, errors), [by_run(table, one) for one in influence]
    product = errors_RxT.T @ errors_RxT / np.maximum(freedom, 1)
    expected = np.einsum("irs,st,jrt->ij", influence_RxT, product, influence_RxT)
    np.testing.assert_allclose(covariance_of(table, np.stack(influence), errors, freedom), expected, rtol=1e-10)

    forms = forms_of_variance(table, np.stack(influence), freedom)
    form = influence_RxT[0].T @ influence_RxT[1] / np.maximum(freedom, 1)
    expected = np.sum((errors_RxT @ form) * errors_RxT)
    np.testing.assert_allclose(variance_of(table, forms, errors)[2], expected, rtol=1e-10)


def test_memory_grows_with_the_table_and_not_with_the_square_of_its_runs():
    table = a_table(30, 10, 14, 5)  # 21,000 rows of 1,500 runs; a matrix of runs takes 18 MB, for each of 420 targets
    slopes = table.mask * np.random.default_rng(0).normal(size=table.mask.shape)
    tracemalloc.start()
    freedom = degrees_of_freedom(table, slopes)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5 * freedom.nbytes
