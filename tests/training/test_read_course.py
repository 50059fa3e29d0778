"""The columns of a run's metrics, read in pieces."""

import tracemalloc

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.training import records
from scaling_jax.training.records import MetricsLine, course, read_course, read_metrics, write_metrics


def lines(count, parts=lambda k: 2):
    one = {"batch_tokens": 128, "small_batch_tokens": 64, "train_loss": [3.0, 2.0], "epoch": 0.1}
    one |= {"small_sq_norm": [2.0, 3.0], "big_sq_norm": [1.0, 2.0]}
    for k in range(count):
        by_layer = {f"{size}_sq_norm_by_layer": [1.0] * parts(k) for size in ("small", "big")} if parts(k) else {}
        loss = {"test_loss": 3.0 - k / count} if k % 3 == 0 else {}
        yield MetricsLine.read({**one, **by_layer, **loss, "step": 2 * k + 2, "tokens": 256 * (k + 1)})


@pytest.mark.parametrize("parts", [lambda k: 2, lambda k: 0, lambda k: 2 * (k < 5)], ids=["all", "none", "some"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 23])
def test_pieces_give_the_columns_of_the_whole(count, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 8)
    write_metrics(tmp_path, list(lines(count, parts)))
    for here, there in zip(read_course(tmp_path), course(read_metrics(tmp_path)), strict=True):
        np.testing.assert_array_equal(here, there)
        assert here is None or here.dtype == there.dtype


def test_a_damaged_line_is_named_in_any_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 8)
    write_metrics(tmp_path, list(lines(20)))
    whole = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*whole[:8], *whole[9:]]))
    with pytest.raises(UserError, match=r"line 9 is damaged .*don't follow the line before"):
        read_course(tmp_path)


def test_memory_is_that_of_the_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 500)
    write_metrics(tmp_path, list(lines(20_000)))
    tracemalloc.start()
    found = read_course(tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(column.nbytes for column in found if column is not None)
    assert most < 3 * size + 2**21  # with all lines in memory 15 times
