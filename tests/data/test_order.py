import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_jax.data import example_order, feeding
from scaling_jax.data.feeding import share_of


@pytest.fixture(params=["table", "index by index"], autouse=True, scope="module")
def both_ways(request):
    """Every property, by NumPy's permutation and by Grain's shuffle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "LARGEST_TABLE", feeding.LARGEST_TABLE if request.param == "table" else 0)
        yield


@settings(deadline=None, max_examples=30)  # Grain takes its time for each new corpus
@given(st.integers(0, 3), st.integers(0, 50), st.lists(st.integers(0, 20), max_size=6), st.integers(1, 23))
def test_any_sequence_of_batch_sizes_sees_the_same_examples(seed, start, batches, num_examples):
    whole = example_order(seed, start, sum(batches), num_examples)
    position, parts = start, []
    for batch in batches:
        parts.append(example_order(seed, position, batch, num_examples))
        position += batch
    assert np.concatenate([*parts, np.zeros(0, np.int32)]).tolist() == whole.tolist()
    assert whole.dtype == np.int32


def test_every_epoch_sees_every_example_once_in_a_new_order():
    epochs = example_order(0, 0, 3000, 1000).reshape(3, 1000)
    assert (np.sort(epochs, axis=1) == np.arange(1000)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_seeds_differ_in_every_epoch():
    epochs = [example_order(seed, 0, 4000, 1000).reshape(4, 1000) for seed in range(3)]
    assert len({tuple(epoch) for epoch in np.concatenate(epochs).tolist()}) == 12


def test_neighbours_in_the_order_are_no_neighbours_in_the_corpus():
    positions = example_order(0, 0, 1000, 1000)
    assert abs(np.corrcoef(positions[:-1], positions[1:])[0, 1]) < 0.15
    assert (np.abs(np.diff(positions)) == 1).mean() < 0.02


def test_small_corpora_keep_the_first_versions_order():
    """Pinned, because committed results depend on it."""
    if feeding.LARGEST_TABLE:
        assert example_order(3, 17, 8, 20).tolist() == [7, 5, 19, 7, 17, 16, 2, 13]


def test_a_huge_corpus_is_shuffled_without_a_table():
    huge = 3 * 10**9
    rows = example_order(0, 10**9, 500, huge)
    assert rows.dtype == np.int64
    assert len(set(rows.tolist())) == 500
    assert rows.min() >= 0
    assert 2**31 < rows.max() < huge
    assert 0.4 < rows.mean() / huge < 0.6


def test_the_memory_that_an_order_takes_does_not_grow_with_the_corpus():
    """Above `LARGEST_TABLE`; a table would have 32 MB at least here, of int32."""
    large = 1 << 23
    assert large > feeding.LARGEST_TABLE
    example_order(0, 0, 1, large)  # imports what it takes
    tracemalloc.start()
    rows = example_order(1, large - 100, 200, large)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(rows[:100].tolist())) == len(set(rows[100:].tolist())) == 100
    assert most < 1e6


@given(st.integers(1, 5), st.sampled_from([1, 2, 3, 4]), st.integers(1, 4))
def test_shares_of_all_processes_are_the_batch_in_order(steps, processes, each):
    order_SxB = np.arange(steps * processes * each).reshape(steps, -1)
    shares = [share_of(order_SxB, p, processes) for p in range(processes)]
    assert np.concatenate(shares, axis=1).tolist() == order_SxB.tolist()


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"6 sequences .*4 processes"):
        share_of(np.zeros((1, 6)), 0, 4)
