import itertools
import threading

import jax
import numpy as np
import pytest

from scaling_jax.data import Corpus, feeding, rows_of
from scaling_jax.data.feeding import Feeder, Span
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Run, read_metrics, run_folder, train


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A memory-mapped corpus that counts as large: 700 rows, each of other tokens."""
    monkeypatch.setattr(feeding, "RESIDENT_BYTES", 0)
    np.arange(700 * 8 + 1, dtype=np.uint16).tofile(tmp_path / "tokens")
    rows = rows_of(np.memmap(tmp_path / "tokens", np.uint16, "r"), 8)
    return Corpus(rows, rows[:5], 65_536, {"sha256": "numbers"})


def spans(first, last, batch_sequences, at_once=16):
    """Steps first … last, `at_once` in a span."""
    edges = [*range(first, last, at_once), last]
    return [Span(a * batch_sequences, b - a, batch_sequences) for a, b in itertools.pairwise(edges)]


def taken(batches, num_devices=1):
    """Rows [steps, share, T + 1] as the devices take them: each its part of the order, of the rows that it has."""
    rows, order = np.asarray(batches.rows), batches.order_SxB
    parts = np.split(order, num_devices, axis=1)
    own = rows if rows.ndim == 3 else [rows] * num_devices
    return np.concatenate([mine[part] for mine, part in zip(own, parts, strict=True)], axis=1)


def rows_fed(corpus, batch_sequences, first, last, process=0, processes=1, num_devices=1):
    """Rows [steps, share, T + 1] of steps first … last, each span expected while the one before is used."""
    asked, fed = spans(first, last, batch_sequences), []
    with Feeder(corpus, 1, 16, num_devices, process, processes) as feeder:
        for span, following in itertools.zip_longest(asked, asked[1:]):
            fed.append(taken(feeder.batches(span), num_devices))
            if following:
                feeder.expect(following)
    return np.concatenate(fed)


@pytest.mark.parametrize("resident", [True, False])
def test_what_four_processes_read_is_what_one_reads_row_for_row(large, monkeypatch, resident):
    """1,000 batches of 12, then 500 of 24, across the ends of epochs."""
    monkeypatch.setattr(feeding, "RESIDENT_BYTES", 1 << 30 if resident else 0)
    for batch_sequences, first, last in ((12, 0, 1000), (24, 500, 1000)):
        one = rows_fed(large, batch_sequences, first, last)
        four = [rows_fed(large, batch_sequences, first, last, p, 4) for p in range(4)]
        assert one.shape == (last - first, batch_sequences, 9)
        assert [share.shape[1] for share in four] == [batch_sequences // 4] * 4
        np.testing.assert_array_equal(np.concatenate(four, axis=1), one)


def test_a_change_of_batch_size_repeats_and_skips_nothing(large):
    """An epoch of 700 rows in batches of 12, of 24 from row 480 on, and of 4 for the rest."""
    parts = [rows_fed(large, 12, 0, 40), rows_fed(large, 24, 20, 29), rows_fed(large, 4, 174, 175)]
    seen = np.concatenate([part[:, :, 0].reshape(-1) for part in parts]) // 8
    assert sorted(seen.tolist()) == list(range(700))


def test_a_process_holds_its_share_alone(large):
    with Feeder(large, 0, 2, process_index=3, process_count=4) as feeder:
        assert {feeder.batches(span).rows.shape for span in spans(0, 3, 12, 2)} == {(1, 2 * 3, 9)}


@pytest.mark.parametrize("num_devices", [2, 4])
def test_a_device_holds_its_share_alone_and_all_shares_are_the_batch(large, num_devices):
    np.testing.assert_array_equal(
        rows_fed(large, 12, 0, 100, num_devices=num_devices), rows_fed(large, 12, 0, 100, num_devices=1)
    )
    with Feeder(large, 0, 2, num_devices) as feeder:
        placed = feeder.batches(Span(0, 2, 12)).rows.addressable_shards
    assert [shard.data.shape for shard in placed] == [(1, 2 * 12 // num_devices, 9)] * num_devices
    assert len({shard.device for shard in placed}) == num_devices


def test_expected_rows_are_read_once_and_meanwhile(large, monkeypatch):
    read, threads = [], set()
    real = feeding.example_order

    def watched(*arguments):
        threads.add(threading.current_thread())
        read.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(feeding, "example_order", watched)
    asked = spans(0, 6, 4, 1)
    with Feeder(large, 0, 1) as feeder:
        feeder.batches(asked[0])
        for span in asked[1:]:
            feeder.expect(span)
            for _ in range(1000):
                if span.examples_seen in read:
                    break
                threading.Event().wait(0.005)
            assert read[-1] == span.examples_seen, "before it is asked for"
            feeder.batches(span)
    assert read == [span.examples_seen for span in asked]
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_what_comes_instead_of_the_expected_is_right(large):
    """A batch ramp that was decided after the next rows were asked for."""
    with Feeder(large, 1, 4) as feeder:
        feeder.batches(Span(0, 4, 4))
        feeder.expect(Span(16, 4, 4))
        fed = taken(feeder.batches(Span(16, 2, 12)))
        np.testing.assert_array_equal(fed, rows_fed(large, 4, 4, 10).reshape(2, 12, 9))


def test_an_error_of_the_reading_thread_arrives(large, monkeypatch):
    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(feeding, "example_order", fail)
    with Feeder(large, 0, 1) as feeder:
        feeder.expect(Span(0, 1, 4))
        with pytest.raises(OSError, match="disk gone"):
            feeder.batches(Span(0, 1, 4))


def test_a_small_corpus_is_placed_once(large, monkeypatch):
    monkeypatch.setattr(feeding, "RESIDENT_BYTES", 1 << 30)
    feeders = [Feeder(large, seed, 4) for seed in (0, 5)]
    placed = [feeder.batches(span).rows for feeder in feeders for span in spans(0, 2, 4, 1)]
    assert all(rows is placed[0] for rows in placed)
    assert isinstance(placed[0], jax.Array)


@pytest.mark.parametrize("backend", ["pmap", "shard_map", "vmap"])
def test_training_is_the_same_whether_the_corpus_is_small_or_large(tmp_path, monkeypatch, backend):
    stream = (np.cumsum(np.random.default_rng(0).integers(1, 4, 16 * 400)) % 257).astype(np.uint16)
    rows = rows_of(stream, 16)
    corpus = Corpus(rows[:320], rows[320:], 257, {"sha256": "counting", "test_bytes_per_token": 0.5})
    model = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
    run = Run(model, batch_tokens=256, learning_rate=1e-2, max_steps=13, eval_tokens=512, steps_per_call=8)
    metrics = []
    for kind, most in (("small", 1 << 30), ("large", 0)):
        monkeypatch.setattr(feeding, "RESIDENT_BYTES", most)
        train(run, tmp_path / kind, corpus=corpus, num_devices=2, backend=backend)
        metrics.append(read_metrics(run_folder(tmp_path / kind, run)))
    if backend == "vmap":  # XLA parts another program among devices where the rows are parted: it rounds otherwise
        for small, large in zip(*metrics, strict=True):
            assert small.train_loss.tolist() == pytest.approx(large.train_loss.tolist(), rel=1e-6)
    else:
        small, large = ([line.json() for line in lines] for lines in metrics)
        assert small == large
    last = metrics[0][-1]
    assert last.epoch == pytest.approx(13 * 16 / 320)
    assert last.test_bits_per_byte == pytest.approx(last.test_loss / np.log(2) / 0.5, rel=1e-6)
