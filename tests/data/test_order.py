import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data import example_order


@given(st.integers(0, 3), st.integers(0, 50), st.lists(st.integers(0, 20), max_size=6), st.integers(1, 23))
def test_any_sequence_of_batch_sizes_sees_the_same_examples(seed, start, batches, num_examples):
    whole = example_order(seed, start, sum(batches), num_examples)
    position, parts = start, []
    for batch in batches:
        parts.append(example_order(seed, position, batch, num_examples))
        position += batch
    assert np.concatenate([*parts, np.zeros(0, np.int32)]).tolist() == whole.tolist()


def test_every_epoch_sees_every_example_once_in_a_new_order():
    epochs = example_order(0, 0, 3000, 1000).reshape(3, 1000)
    assert (np.sort(epochs, axis=1) == np.arange(1000)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_seeds_differ():
    assert example_order(0, 0, 100, 1000).tolist() != example_order(1, 0, 100, 1000).tolist()
