"""Which example comes when: a pure function of the seed and of how many examples were seen before."""

import functools

import numpy as np

LARGEST_TABLE = 1 << 22  # examples; a permutation of more is computed index by index instead of held in memory


def example_order(seed: int, examples_seen: int, count: int, num_examples: int) -> np.ndarray:
    """Rows [count] (int32; int64 above 2³¹) that follow after `examples_seen`: each epoch permutes all of them afresh.

    A batch therefore depends on neither the batch size before it nor the number of devices or processes: resuming or
    changing the batch size in mid-run repeats and skips nothing. Above `LARGEST_TABLE` examples (2³² at
    most) Grain's index shuffle takes the place of NumPy's permutation: no memory and no wait at an epoch's start.
    """
    if num_examples > LARGEST_TABLE:
        shuffled, dtype = _grain_shuffle(seed, num_examples), np.int32 if num_examples <= 2**31 else np.int64
        return np.array([shuffled[i] for i in range(examples_seen, examples_seen + count)], dtype)
    positions = np.arange(examples_seen, examples_seen + count)
    epochs, offsets = np.divmod(positions, num_examples)
    rows = np.empty(count, np.int32)
    for epoch in range(epochs[0], epochs[-1] + 1) if count else ():
        inside = epochs == epoch
        rows[inside] = _permutation(seed, int(epoch), num_examples)[offsets[inside]]
    return rows


def share_of(order_SxB: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
    """A process's columns [S, B / process_count] of each step's batch; those of all processes make the batch, in order.

    Raises:
      ValueError: if the batch doesn't split.
    """
    batch = order_SxB.shape[1]
    if batch % process_count:
        raise ValueError(f"a batch of {batch} sequences doesn't split over {process_count} processes")
    return order_SxB.reshape(-1, process_count, batch // process_count)[:, process_index]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _grain_shuffle(seed: int, num_examples: int):
    import grain  # seconds to import

    # Grain adds the epoch to the seed: neighbouring seeds would see each other's epochs.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(num_examples).shuffle(seed=spread).repeat()
