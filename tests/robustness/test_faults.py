"""Machines that fail: full disks, kills in the middle of a write, clocks that jump."""

import errno
import itertools
import os
import types

import pytest

from scaling_jax.io.files import write_json
from scaling_jax.training import journal, records, train
from tests.robustness.conftest import contents
from tests.training.counting import CORPUS, RUN

resource = pytest.importorskip("resource")


class Killed(BaseException):
    """Where a process would just be gone."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(RUN, folder, corpus=CORPUS, num_devices=1), metrics(folder)


def metrics(folder):
    return (folder / "runs" / RUN.run_id / "metrics.jsonl").read_bytes()


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [full_disk, Killed])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(step, error, tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})
    before = contents(tmp_path)

    def fail(*_):
        raise error() if error is Killed else full_disk()

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((OSError, Killed)):
        write_json(tmp_path / "a.json", {"new": 2})
    assert contents(tmp_path) == before


def test_a_file_that_grows_too_large_for_the_disk_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_json(tmp_path / "a.json", {"new": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


def test_a_fit_that_cannot_be_written_is_refused_and_leaves_the_old_one(refuses, measured, monkeypatch):
    measured.with_suffix(".fit.json").write_text("the old one")
    monkeypatch.setattr(os, "fsync", full_disk)
    refuses("fit", measured, names="No space left on device", watched=(measured.parent,))


@pytest.mark.parametrize("lines", [0, 2])
def test_a_run_whose_disk_is_full_continues_to_the_same_end(lines, undisturbed, tmp_path, monkeypatch):
    written = itertools.count()
    append = journal.append_metrics

    def append_some(folder, line):
        if next(written) >= lines:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 1')  # what still found room
            full_disk()
        append(folder, line)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "append_metrics", append_some)
        with pytest.raises(OSError, match="No space left"):
            train(RUN, tmp_path, corpus=CORPUS, num_devices=1, checkpoint_seconds=0)
    result = train(RUN, tmp_path, corpus=CORPUS, num_devices=1)
    assert (result, metrics(tmp_path)) == undisturbed


def test_clocks_that_jump_change_no_result(undisturbed, tmp_path, monkeypatch):
    jumps = itertools.cycle([0.0, -1e9, 1e9, 3.0, 3.0])
    clock = types.SimpleNamespace(time=lambda: next(jumps), monotonic=lambda: next(jumps))
    for module in (journal, records):  # not Orbax's, which may wait by it
        monkeypatch.setattr(module, "time", clock)
    seen = []
    result = train(RUN, tmp_path, corpus=CORPUS, num_devices=1, on_progress=seen.append)
    assert (result, metrics(tmp_path)) == undisturbed
    assert all(p.tokens_per_second > 0 for p in seen)
