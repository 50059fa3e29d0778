"""The order of training examples, and the batches of a run on its devices.

The order is a pure function of the seed and of the number of examples seen before.
"""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_jax.data.corpus import Corpus
from scaling_jax.data.examples import Examples, count, num_bytes, take
from scaling_jax.parallel import deal_out, replicate

LARGEST_TABLE = 1 << 22  # examples; a larger permutation isn't held in memory but computed index by index
RESIDENT_BYTES = 1 << 30  # up to this size, all train rows are placed on the devices, once per process
_placed: dict[Any, Any] = {}


def example_order(seed: int, examples_seen: int, count: int, num_examples: int) -> np.ndarray:
    """The next `count` rows after `examples_seen`, int32 (int64 above 2³¹). Each epoch permutes all rows anew.

    So a batch depends neither on earlier batch sizes nor on the number of devices or processes. Resuming, or changing
    the batch size during a run, repeats and skips nothing.

    Above `LARGEST_TABLE` examples (at most 2³²), Grain's index shuffle replaces NumPy's permutation. It needs no memory
    and no time at the start of an epoch.
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
    """One process's part [S, B / process_count] of each step's batch. The parts in process order make the whole batch.

    Raises:
      ValueError: if the batch doesn't divide by the number of processes.
    """
    batch = order_SxB.shape[1]
    if batch % process_count:
        raise ValueError(f"a batch of {batch} sequences doesn't split over {process_count} processes")
    return order_SxB.reshape(-1, process_count, batch // process_count)[:, process_index]


class Span(NamedTuple):
    """Consecutive steps with one batch size. The span and the seed determine the batches."""

    examples_seen: int  # before the first step
    num_steps: int
    batch_sequences: int  # over all processes


class Batches(NamedTuple):
    """Rows on the devices, and the rows that each step takes. Rows of text are an array, others a pytree of arrays."""

    rows: Any  # [R, …], all train rows on every device; of large data [num_devices, R, …], each device's own rows
    order_SxB: np.ndarray  # [steps, this process's sequences]; of large data, indices of the device's own rows
    own_rows: bool = False  # each device has its own rows


class Feeder:
    """Gives this process the batches of any span of steps. Use it as a context manager.

    Data above `RESIDENT_BYTES`, and sources, are read span by span; each process reads its own part, and each device
    gets only its own rows. While the devices train on a span, a thread reads the next expected one. The devices hold
    the rows of at most three spans.
    """

    def __init__(
        self,
        corpus: Corpus | Examples,
        seed: int,
        longest: int,
        num_devices: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`longest` is the largest number of steps in a span. Shorter spans are padded, so all use one program."""
        self._corpus, self._seed, self._longest, self._num_devices = corpus, seed, longest, num_devices
        self._process, self._num_rows = (process_index, process_count), count(corpus.train)
        self._resident = resident_rows(corpus, num_devices) if is_resident(corpus) else None
        self._thread = ThreadPoolExecutor(1, "reads ahead")
        self._expected: tuple[Span, Future] | None = None

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown()

    def batches(self, span: Span) -> Batches:
        """The batches of a span; fast if the span was expected."""
        if self._resident is not None:
            return Batches(self._resident, self._order(span))
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == span:
            return expected[1].result()
        return self._thread.submit(self._read, span).result()

    def expect(self, span: Span) -> None:
        """Starts to read the span that will probably be next."""
        if self._resident is None and span.num_steps > 0:
            self._expected = span, self._thread.submit(self._read, span)

    def _order(self, span: Span) -> np.ndarray:
        num_drawn = span.num_steps * span.batch_sequences
        order = example_order(self._seed, span.examples_seen, num_drawn, self._num_rows)
        return share_of(order.reshape(-1, span.batch_sequences), *self._process)

    def _read(self, span: Span) -> Batches:
        order_SxB, num_devices = self._order(span), self._num_devices
        num_steps = len(order_SxB)
        order_DxSxB = order_SxB.reshape(num_steps, num_devices, -1).swapaxes(0, 1)
        each = order_DxSxB.shape[2]

        def padded(x):
            rows = np.zeros((num_devices, self._longest * each, *x.shape[2:]), x.dtype)
            rows[:, : num_steps * each] = x
            return rows

        # Not np.take, which would copy the whole view first.
        read = take(self._corpus.train, order_DxSxB.reshape(-1))
        shared = jax.tree.map(lambda x: padded(x.reshape(num_devices, num_steps * each, *x.shape[1:])), read)
        own_order_SxB = np.tile(np.arange(num_steps * each).reshape(num_steps, each), num_devices)
        return Batches(deal_out(shared, num_devices), own_order_SxB, own_rows=True)


def is_resident(corpus: Corpus | Examples) -> bool:
    """True if the train rows fit on every device, so that they are placed there once."""
    return num_bytes(corpus.train) <= RESIDENT_BYTES


def resident_rows(corpus: Corpus | Examples, num_devices: int) -> Any:
    """The train rows on the devices, placed there once per process."""
    leaves, tree = jax.tree.flatten(corpus.train)
    shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
    key = (corpus.manifest["sha256"], corpus.manifest.get("tokenizer_sha256"), shapes, tree, num_devices)
    if key not in _placed:
        _placed[key] = replicate(jax.tree.map(np.ascontiguousarray, corpus.train), num_devices)
    return _placed[key]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _grain_shuffle(seed: int, num_examples: int):
    import grain  # takes seconds

    # Grain adds the epoch to the seed, so neighbouring seeds would have the same epochs, shifted.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(num_examples).shuffle(seed=spread).repeat()
