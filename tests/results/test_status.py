import dataclasses
import io
import json
import os
import re
import shutil
import time

import pytest
from rich.console import Console

from scaling_jax.console.tables import status_table
from scaling_jax.io import UserError
from scaling_jax.report.words import clock
from scaling_jax.results import read_results
from scaling_jax.results.status import read_status
from scaling_jax.scanning import Cell
from scaling_jax.scanning.branches import plan_branches
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Run
from tests.made_up_scan import evaluated_lines, write_run

fcntl = pytest.importorskip("fcntl")

LARGEST = Cell("1x32", 8_192, 0)


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
    console.print(status_table(status))
    return console.export_text()


def begin(workdir, cell):
    """Leaves a cell its first run; returns its folder."""
    (workdir / "cells" / f"{cell.file_name}.json").unlink()
    folders = list((workdir / "runs").glob(f"{cell.model}-b{cell.batch_tokens}-*"))
    (first,) = [f for f in folders if json.loads((f / "config.json").read_text())["run"]["max_steps"] is None]
    for folder in folders:
        if folder != first:
            shutil.rmtree(folder)
    return first


def cut(folder, seconds_ago, lines=30, timed=True):
    """A run that has got to its 30th evaluation."""
    (folder / "result.json").unlink()
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:lines]]
    times = []
    for k, line in enumerate(written if timed else ()):
        times.append({"step": line["step"], "time": time.time() - seconds_ago - 0.5 * (len(written) - 1 - k)})
    (folder / "clock.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in times))
    text = "".join(json.dumps(line) + "\n" for line in written)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99')  # cut off, as it is while it is written
    os.utime(folder / "metrics.jsonl", (time.time() - seconds_ago,) * 2)
    return [line | entry for line, entry in zip(written, times, strict=True)] if timed else written


def test_a_finished_scan_is_done(scan):
    status = read_status(scan)
    assert {part.state for part in status.parts} == {"done"}
    assert (status.running, status.fraction, status.seconds_left) == (False, pytest.approx(1), None)
    assert "made-up: 14 of 14 batch sizes done\n" in printed(status)


def test_a_running_scan_shows_its_newest_losses_speed_and_time_left(scan):
    shutil.rmtree(begin(scan, Cell("1x16", 128, 0)))
    begun = begin(scan, LARGEST)
    lines = cut(begun, seconds_ago=3)
    with (scan / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read_status(scan)
    parts = {part.name: part for part in status.parts}
    assert status.running
    assert parts["1x16 · 128 tokens"].state == "not begun"
    part = parts["1x32 · 8,192 tokens"]
    assert (part.state, part.rates_tried, part.step) == ("running", 1, lines[-1]["step"])
    assert part.test_loss == lines[-1]["test_loss"]
    expected = (lines[-1]["tokens"] - lines[0]["tokens"]) / (lines[-1]["time"] - lines[0]["time"])
    assert part.tokens_per_second == pytest.approx(expected)
    assert part.seconds_ago == pytest.approx(3, abs=2)
    # A minute of this session brought a sixth of the largest cell; what is left is the rest of it and a small one.
    assert 300 < status.seconds_left < 600
    assert re.search("made-up: 12 of 14 .*done.* 1 running.* 1 not begun", printed(status))
    assert f"{lines[-1]['test_loss']:.3f}" in printed(status)


def test_trunks_and_branches_are_no_learning_rates_of_a_cell(scan):
    """A trunk is the best run once more; a branch has the same first rate."""
    before = [part.rates_tried for part in read_status(scan).parts]
    results = read_results(scan)
    plan = plan_branches(results.cells[0].best, most_points=1)
    for run in (plan.trunk, plan.branch(plan.points[0], 2, 1), plan.continued(plan.points[0], 1)):
        other = dataclasses.replace(run, learning_rate=1.5 * run.learning_rate)
        write_run(scan, other, evaluated_lines(other, [(100, 3.5)]), "exhausted")
    assert [part.rates_tried for part in read_status(scan).parts] == before


def test_a_scan_that_died_says_how_to_go_on(scan):
    begun = begin(scan, LARGEST)
    cut(begun, seconds_ago=30)
    status = read_status(scan)
    assert not status.running
    (part,) = [part for part in status.parts if part.state != "done"]
    assert part.state == "interrupted"
    assert part.tokens_per_second is None
    assert re.search("made-up: 13 of 14 .*done.* 1 interrupted", printed(status))
    assert "same command again" in printed(status)


def test_a_run_left_by_an_earlier_session_waits(scan):
    begun = begin(scan, LARGEST)
    cut(begun, seconds_ago=300)
    with (scan / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read_status(scan)
    assert [part.state for part in status.parts if part.state != "done"] == ["interrupted"]


def test_lines_without_times_have_no_speed(scan):
    begun = begin(scan, LARGEST)
    cut(begun, seconds_ago=1, timed=False)
    with (scan / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read_status(scan)
    (part,) = [part for part in status.parts if part.state == "running"]
    assert part.tokens_per_second is None
    assert part.test_loss


def test_nothing_is_written_and_the_lock_is_free_again(scan):
    before = {path: path.stat().st_mtime_ns for path in scan.rglob("*")}
    read_status(scan)
    assert {path: path.stat().st_mtime_ns for path in scan.rglob("*")} == before
    with (scan / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_without_a_scan_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        read_status(tmp_path)


RUN = Run(ModelConfig(1, 16, 1), batch_tokens=128, learning_rate=1e-2, max_steps=200)


def test_single_runs_are_told_by_themselves(tmp_path):
    """Two that differ in learning rate: one is done, the other half-way, first in its process and then without it."""
    other = dataclasses.replace(RUN, learning_rate=2e-2)
    write_run(tmp_path, RUN, evaluated_lines(RUN, [(100, 3.5), (200, 3.0)]), "exhausted")
    write_run(tmp_path, other, evaluated_lines(other, [(100, 3.25)]), "exhausted")
    folder = tmp_path / "runs" / other.run_id
    (folder / "result.json").unlink()
    with (folder / ".lock").open("w") as lock:
        os.utime(folder / ".lock", (time.time() - 60,) * 2)
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = read_status(tmp_path)
    died = read_status(tmp_path)
    assert [part.state for part in running.parts] == ["done", "running"]
    assert [part.state for part in died.parts] == ["done", "interrupted"]
    assert (running.running, died.running) == (True, False)
    for status in (running, died):
        assert (status.name, status.what) == (tmp_path.name, "runs")
        assert [part.name for part in status.parts] == [RUN.label, other.label]
        assert [part.learning_rate for part in status.parts] == [1e-2, 2e-2]
        assert [(part.step, part.test_loss) for part in status.parts] == [(200, 3.0), (100, 3.25)]
        assert status.fraction == pytest.approx(0.75)
        assert re.search(f"{tmp_path.name}: 1 of 2 runs done", printed(status))


@pytest.mark.parametrize(("seconds", "text"), [(9, "0:09"), (754, "12:34"), (3_723, "1:02:03")])
def test_durations(seconds, text):
    assert clock(seconds) == text
