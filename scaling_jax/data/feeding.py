"""Which example comes when: a pure function of the seed and of how many examples were seen before."""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.data.corpus import Corpus
from scaling_jax.parallel import deal_out, replicate

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


RESIDENT_BYTES = 1 << 30  # of train rows: up to here they are placed on the devices, once a process


class Span(NamedTuple):
    """Steps of one batch size: their batches are a function of the seed and of this."""

    examples_seen: int  # before the first
    num_steps: int
    batch_sequences: int  # of all processes


class Batches(NamedTuple):
    """Rows on the devices, and which of them each step takes [steps, this process's sequences].

    All devices have the rows of a small corpus [R, T + 1]. Of a large one each has those that it takes alone
    [num_devices, R, T + 1], and its part of the order counts in them.
    """

    rows: Any
    order_SxB: np.ndarray


class Feeder:
    """The batches of any span of steps, for this process; a context manager.

    Rows of a corpus above `RESIDENT_BYTES` are read when they are asked for, the process's share alone; a thread reads
    those that are expected next meanwhile. Each device is given
    its share alone; the devices then hold the rows of up to three spans.
    """

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        longest: int,
        num_devices: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`longest` is the most steps of a span: shorter ones are padded to it, so that all share a program."""
        self._corpus, self._seed, self._longest, self._num_devices = corpus, seed, longest, num_devices
        self._process = process_index, process_count
        self._resident = resident_rows(corpus, num_devices) if is_resident(corpus) else None
        self._thread = ThreadPoolExecutor(1, "reads ahead")
        self._expected: tuple[Span, Future] | None = None

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown()

    def batches(self, span: Span) -> Batches:
        """What the span's steps train on, whether it was expected or not."""
        if self._resident is not None:
            return Batches(self._resident, self._order(span))
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == span:
            return expected[1].result()
        return self._thread.submit(self._read, span).result()

    def expect(self, span: Span) -> None:
        """Starts to read a span that `batches` will probably be asked for next."""
        if self._resident is None and span.num_steps > 0:
            self._expected = span, self._thread.submit(self._read, span)

    def _order(self, span: Span) -> np.ndarray:
        count = span.num_steps * span.batch_sequences
        order = example_order(self._seed, span.examples_seen, count, len(self._corpus.train_RxT1))
        return share_of(order.reshape(-1, span.batch_sequences), *self._process)

    def _read(self, span: Span) -> Batches:
        order_SxB, corpus_RxT1 = self._order(span), self._corpus.train_RxT1
        num_steps, num_devices = len(order_SxB), self._num_devices
        order_DxSxB = order_SxB.reshape(num_steps, num_devices, -1).swapaxes(0, 1)
        each = order_DxSxB.shape[2]
        rows_DxRxT1 = np.zeros((num_devices, self._longest * each, corpus_RxT1.shape[1]), corpus_RxT1.dtype)
        # np.take would copy the whole view first
        rows_DxRxT1[:, : num_steps * each] = corpus_RxT1[order_DxSxB.reshape(num_devices, -1)]
        own_order_SxB = np.tile(np.arange(num_steps * each).reshape(num_steps, each), num_devices)
        return Batches(deal_out(rows_DxRxT1, num_devices), own_order_SxB)


def is_resident(corpus: Corpus) -> bool:
    return corpus.train_RxT1.nbytes <= RESIDENT_BYTES


_placed: dict[Any, Any] = {}


def resident_rows(corpus: Corpus, num_devices: int) -> Any:
    """The train rows on the devices, placed once a process."""
    key = (corpus.manifest["sha256"], corpus.manifest.get("tokenizer_sha256"), corpus.train_RxT1.shape, num_devices)
    if key not in _placed:
        _placed[key] = replicate(np.ascontiguousarray(corpus.train_RxT1), num_devices)
    return _placed[key]
