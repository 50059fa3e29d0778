import dataclasses
import io
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from rich.console import Console

from scaling_jax.console import commands, scan_display
from scaling_jax.console.scan_display import ScanDisplay
from scaling_jax.results import read_results
from scaling_jax.scanning import Event, Experiment, LearningRates, Subject, powers_of_two
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Interrupted, Progress, Run, RunResult, run_folder
from scaling_jax.training.metrics import MetricsLine
from scaling_jax.training.records import write_metrics

EXPERIMENT = Experiment(
    name="small",
    subjects=(Subject(ModelConfig(1, 16, 1), (2.5,), LearningRates(1e-2, 1_000)),),
    batch_tokens=powers_of_two(128, 1_024),
    max_tokens=10_000,
)
CELLS = EXPERIMENT.cells


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(scan_display.time, "monotonic", lambda: now[0])
    return now


def progress(cell, learning_rate=1e-2, step=50, test_loss=2.75):
    now = Progress(
        model=cell.model,
        batch_tokens=cell.batch_tokens,
        learning_rate=learning_rate,
        seed=cell.seed,
        run_id=f"{cell.file_name}-{learning_rate}",
        step=step,
        last_step=100,
        tokens=step * cell.batch_tokens,
        test_loss=test_loss,
        tokens_per_second=12_345.0,
        noise_scale_tokens=float("nan"),
    )
    return Event(cell, now)


def console():
    return Console(file=io.StringIO(), width=80)


def test_a_log_gets_a_line_a_cell_and_one_a_minute(clock):
    shown = console()
    with ScanDisplay(EXPERIMENT, shown) as display:
        for second in range(0, 100, 10):
            clock[0] = float(second)
            display.on_event(progress(CELLS[0]))
        display.on_event(progress(CELLS[0], learning_rate=2e-2, test_loss=3.25))
        display.on_event(Event(CELLS[0]))
        display.on_event(Event(None))
    running, done, _ = shown.file.getvalue().splitlines()
    for line, values in (
        (running, ("1:10 ", "0 of 4", "1x16 · 128 tokens", "step 50", "2.750", "12.3k tokens/s")),
        (done, ("1:30 ", "1 of 4", "1x16 · 128 tokens", "2 learning rates", "2.750")),
    ):
        assert [value for value in values if value not in line] == []
    assert "\x1b" not in shown.file.getvalue()


def test_a_cell_that_is_done_tells_its_lowest_loss_not_that_of_its_last_run_or_of_one_that_diverged(clock):
    shown = console()
    with ScanDisplay(EXPERIMENT, shown) as display:
        for rate, loss in ((4e-2, float("nan")), (1e-2, 2.5), (1e-2, 2.75), (5e-3, 3.009)):
            display.on_event(progress(CELLS[0], learning_rate=rate, test_loss=loss))
        display.on_event(Event(CELLS[0]))
    (done,) = shown.file.getvalue().splitlines()
    assert "lowest loss 2.500" in done


def test_a_continued_scan_counts_what_was_done_but_not_as_its_own_speed(clock):
    shown = console()
    with ScanDisplay(EXPERIMENT, shown, done=CELLS[1:]) as display:
        clock[0] = 100.0
        display.on_event(progress(CELLS[0], step=100))
        assert display._time_left() == "8:20"  # 100 s for half of the first of three rates
        display.on_event(Event(CELLS[0]))
    assert "4 of 4" in shown.file.getvalue()
    assert "0:00" in shown.file.getvalue()


def test_a_terminal_shows_the_same_live():
    shown = Console(file=io.StringIO(), width=120, force_terminal=True)
    with ScanDisplay(EXPERIMENT, shown) as display:
        display.on_event(progress(CELLS[2]))
        table = Console(file=io.StringIO(), width=120)
        table.print(display._render())
    text = table.file.getvalue()
    assert "small" in text
    assert "0 of 4" in text
    assert "1x16 · 512 tokens" in text
    assert "0.01" in text
    assert "2.750" in text


@pytest.fixture
def workdir(made_up, tmp_path):
    return shutil.copytree(made_up[1], tmp_path / "scan")


RUN = Run(ModelConfig(1, 16, 1), 128, 1e-3, max_steps=100)


def lines_of(steps, grad_sq_norm, trace_cov):
    """A line whose steps scatter around two moments by a tenth of tr(Σ)/B."""
    draws = np.random.default_rng(0).normal(1, 0.1, (2, steps))
    small, big = (grad_sq_norm + draw * trace_cov / tokens for draw, tokens in zip(draws, (64, 128), strict=True))
    values = {"step": steps, "tokens": 128 * steps, "batch_tokens": 128, "small_batch_tokens": 64, "test_loss": 2.5}
    norms = {"small_sq_norm": small.tolist(), "big_sq_norm": big.tolist()}
    return [MetricsLine.read(values | norms | {"train_loss": [2.5] * steps})]


@pytest.mark.parametrize(
    ("run", "status", "ending"),
    [
        (RUN, "exhausted", "reached max_steps (100)"),
        (dataclasses.replace(RUN, max_steps=None, max_tokens=12_800), "exhausted", "reached max_tokens (12,800)"),
        (dataclasses.replace(RUN, target_loss=2.6), "reached", "reached the target loss (2.6)"),
        (RUN, "diverged", "diverged"),
    ],
)
@pytest.mark.parametrize(
    ("steps", "moments", "noise"),
    [
        (100, (1.0, 300.0), r"25 steps\D+\d+ tokens \[(\d+), (\d+)\]"),
        (100, (0.0, 300.0), r"25 steps.*unresolved"),
        (19, (1.0, 300.0), r"few[^\[]*$"),
    ],
)
def test_training_ends_with_how_it_ended_and_its_noise_scale(
    run, status, ending, steps, moments, noise, tmp_path, monkeypatch, capsys
):
    def train(run, results, **_):
        write_metrics(run_folder(results, run), lines_of(steps, *moments))
        return RunResult(run.run_id, status, steps, 128 * steps, 2.5, "")

    monkeypatch.setattr(commands, "train", train)
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)
    commands.train_on_console(run, tmp_path, None)
    first, second, third = capsys.readouterr().out.splitlines()
    assert ending in first
    assert f"{steps} steps" in first
    assert "2.5000" in first
    found = re.search(noise, second)
    assert found
    if found.groups():
        low, high = map(int, found.groups())
        assert low < 300 < high
    assert third.endswith(str(run_folder(tmp_path, run)))


def test_an_interval_that_may_be_too_narrow_gets_one_more_line(tmp_path, monkeypatch, capsys):
    (line,) = lines_of(100, 1.0, 300.0)
    line.small_sq_norm[90] *= 100

    def train(run, results, **_):
        write_metrics(run_folder(results, run), [line])
        return RunResult(run.run_id, "exhausted", 100, 12_800, 2.5, "")

    monkeypatch.setattr(commands, "train", train)
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)
    commands.train_on_console(RUN, tmp_path, None)
    _, noise, note, _ = capsys.readouterr().out.splitlines()
    assert "25 steps" in noise
    assert re.search(r"too narrow.*25 steps.*skewness 4", note)


def scans(workdir):
    commands.scan_on_console(EXPERIMENT, workdir)


def trains(workdir):
    commands.train_on_console(RUN, workdir, None)


def branches(workdir):
    commands.branch_on_console(read_results(workdir), ["1x16"], 128, 0.01)


@pytest.mark.parametrize("command", [scans, trains, branches])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_save_and_only_ctrl_c_is_an_interruption(command, number, workdir, monkeypatch, capsys):
    def ask():
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # Python handles signals between its own instructions

    def scan(*_, **__):
        """As the workers' parent: interrupted at once."""
        ask()
        raise AssertionError("not interrupted")

    def train(*_, should_stop, **__):
        """As what asks between calls to the device."""
        assert not should_stop()
        ask()
        assert should_stop()
        raise Interrupted

    for name, stand_in in (("scan", scan), ("train", train), ("train_branches", train)):
        monkeypatch.setattr(commands, name, stand_in)
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        command(workdir)
    if number == signal.SIGTERM:
        assert ended.type is SystemExit
        assert ended.value.code == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert "saved" in last
        assert "same command" in last
    else:
        assert ended.type is KeyboardInterrupt
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
