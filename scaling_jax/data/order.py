"""Which example comes when: a pure function of the seed and of how many examples were seen before."""

import functools

import numpy as np


def example_order(seed: int, examples_seen: int, count: int, num_examples: int) -> np.ndarray:
    """Rows [count] (int32) that follow after `examples_seen`: each epoch is a fresh permutation of all rows.

    A batch therefore depends on neither the batch size before it nor the number of devices or processes: resuming or
    changing the batch size in mid-run repeats and skips nothing.
    """
    positions = np.arange(examples_seen, examples_seen + count)
    epochs, offsets = np.divmod(positions, num_examples)
    rows = np.empty(count, np.int32)
    for epoch in range(epochs[0], epochs[-1] + 1) if count else ():
        inside = epochs == epoch
        rows[inside] = _permutation(seed, int(epoch), num_examples)[offsets[inside]]
    return rows


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples).astype(np.int32)
