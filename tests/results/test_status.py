import io
import json
import os
import shutil
import time

import pytest
from rich.console import Console

from scaling_jax.io import UserError
from scaling_jax.report.status import duration, print_status, read_status

fcntl = pytest.importorskip("fcntl")


@pytest.fixture
def scan(made_up, tmp_path):
    """A copy of a finished scan, of which tests take away; ten minutes old but for its lock."""
    workdir = tmp_path / "scan"
    shutil.copytree(made_up[1], workdir)
    (workdir / ".lock").write_text("1")
    then = time.time() - 600
    for path in workdir.glob("runs/*/*"):
        os.utime(path, (then, then))
    lock = time.time() - 60
    os.utime(workdir / ".lock", (lock, lock))
    return workdir


def printed(status):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(print_status(status))
    return console.export_text()


def begin(workdir, name):
    """Leaves a group its first run; returns its folder."""
    folders = list((workdir / "runs").glob(f"{name}-*"))
    (first,) = [f for f in folders if json.loads((f / "config.json").read_text())["run"]["max_steps"] is None]
    for folder in folders:
        if folder != first:
            shutil.rmtree(folder)
    return first


def cut(folder, seconds_ago, lines=30, timed=True):
    """A run that has got to its 30th evaluation."""
    (folder / "result.json").unlink()
    kept = (folder / "metrics.jsonl").read_text().splitlines()[:lines]
    batch = int(folder.name.split("-b")[1].split("-")[0])
    written, clock = [], []
    for k, line in enumerate(map(json.loads, kept)):
        at = time.time() - seconds_ago - 0.5 * (len(kept) - 1 - k)
        written.append(line | {"tokens": line["step"] * batch})
        if timed:
            clock.append({"step": line["step"], "time": at})
    (folder / "clock.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in clock))
    text = "".join(json.dumps(line) + "\n" for line in written)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99')  # cut off, as it is while it is written
    os.utime(folder / "metrics.jsonl", (time.time() - seconds_ago,) * 2)
    return [line | entry for line, entry in zip(written, clock, strict=True)] if timed else written


def test_a_finished_scan_is_done(scan):
    status = read_status(scan)
    assert {g.state for g in status.groups} == {"done"}
    assert (status.running, status.fraction, status.seconds_left) == (False, pytest.approx(1), None)
    assert "made-up: 14 of 14 batch sizes done\n" in printed(status)


def test_a_running_scan_shows_its_newest_losses_speed_and_time_left(scan):
    shutil.rmtree(begin(scan, "1x16-b128"))
    begun = begin(scan, "1x32-b8192")
    lines = cut(begun, seconds_ago=3)
    with (scan / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read_status(scan)
    groups = {g.name: g for g in status.groups}
    assert status.running
    assert groups["1x16 · 128 tokens"].state == "missing"
    group = groups["1x32 · 8,192 tokens"]
    assert (group.state, group.rates_tried, group.step) == ("running", 1, lines[-1]["step"])
    assert group.test_loss == lines[-1]["test_loss"]
    expected = (lines[-1]["tokens"] - lines[0]["tokens"]) / (lines[-1]["time"] - lines[0]["time"])
    assert group.tokens_per_second == pytest.approx(expected)
    assert group.seconds_ago == pytest.approx(3, abs=2)
    # A minute of this session brought a sixth of the largest group; what is left is the rest of it and a small one.
    assert 300 < status.seconds_left < 600
    assert "made-up: 12 of 14 batch sizes done, 1 running, 1 not begun" in printed(status)
    assert f"{lines[-1]['test_loss']:.3f}" in printed(status)


def test_a_scan_that_died_says_how_to_go_on(scan):
    begun = begin(scan, "1x32-b8192")
    cut(begun, seconds_ago=30)
    status = read_status(scan)
    assert not status.running
    (group,) = [g for g in status.groups if g.state != "done"]
    assert group.state == "interrupted"
    assert group.tokens_per_second is None
    assert "It isn't running: the same command continues it." in printed(status)


def test_a_run_left_by_an_earlier_session_waits(scan):
    begun = begin(scan, "1x32-b8192")
    cut(begun, seconds_ago=300)
    with (scan / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read_status(scan)
    assert [g.state for g in status.groups if g.state != "done"] == ["interrupted"]


def test_lines_without_times_have_no_speed(scan):
    begun = begin(scan, "1x32-b8192")
    cut(begun, seconds_ago=1, timed=False)
    with (scan / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read_status(scan)
    (group,) = [g for g in status.groups if g.state == "running"]
    assert group.tokens_per_second is None
    assert group.test_loss


def test_nothing_is_written_and_the_lock_is_free_again(scan):
    before = {path: path.stat().st_mtime_ns for path in scan.rglob("*")}
    read_status(scan)
    assert {path: path.stat().st_mtime_ns for path in scan.rglob("*")} == before
    with (scan / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_without_a_scan_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no scan"):
        read_status(tmp_path)


@pytest.mark.parametrize(("seconds", "text"), [(9, "0:09"), (754, "12:34"), (3_723, "1:02:03")])
def test_durations(seconds, text):
    assert duration(seconds) == text
