import io
import os
import signal
import time

import pytest
from rich.console import Console

from scaling_jax.console import live
from scaling_jax.console.commands import ScanDisplay
from scaling_jax.scanning import Experiment, LearningRates, Subject, powers_of_two
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Interrupted, Run

EXPERIMENT = Experiment(
    "small", (Subject(ModelConfig(1, 16, 1), (2.5,), LearningRates(1e-2, 1_000)),), powers_of_two(128, 1_024), 10_000
)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def progress(group, rate="1e-2", step=50):
    return {
        "event": "progress",
        "group": group,
        "run_id": f"1x16-b128-lr{rate}-s0-abc",
        "step": step,
        "last_step": 100,
        "test_loss": 2.75,
        "tokens_per_second": 12_345.0,
        "noise_scale_tokens": float("nan"),
    }


def console():
    return Console(file=io.StringIO(), width=80)


def test_a_log_gets_a_line_a_group_and_one_a_minute(clock):
    shown = console()
    with ScanDisplay(EXPERIMENT, shown) as display:
        for second in range(0, 100, 10):
            clock[0] = float(second)
            display.on_event(progress(0))
        display.on_event({"event": "done", "group": 0})
        display.on_event({"event": "stopping"})
    lines = shown.file.getvalue().splitlines()
    assert len(lines) == 3, lines
    assert lines[0].startswith("1:10  0 of 4 done, about ")
    assert lines[0].endswith("running: 1x16 · 128 tokens at step 50, loss 2.750, 12.3k tokens/s")
    assert lines[1].startswith("1:30  1 of 4 done, about ")
    assert lines[1].endswith("done: 1x16 · 128 tokens, 1 learning rates, loss 2.750")
    assert "\x1b" not in shown.file.getvalue()


def test_a_continued_scan_counts_what_was_done_but_not_as_its_own_speed(clock):
    shown = console()
    with ScanDisplay(EXPERIMENT, shown, done=(1, 2, 3)) as display:
        clock[0] = 100.0
        display.on_event(progress(0, step=100))
        assert display._time_left() == "8:20"  # 100 s for half of the first of three rates
        display.on_event({"event": "done", "group": 0})
    assert "4 of 4 done, about 0:00 left" in shown.file.getvalue()


def test_a_terminal_shows_the_same_live():
    shown = Console(file=io.StringIO(), width=120, force_terminal=True)
    with ScanDisplay(EXPERIMENT, shown) as display:
        display.on_event(progress(2))
        table = Console(file=io.StringIO(), width=120)
        table.print(display._render())
    text = table.file.getvalue()
    assert "small: 0 of 4 batch sizes done" in text
    assert "1x16 · 512 tokens" in text
    assert "2.750" in text


def scans(tmp_path):
    live.scan_on_console(EXPERIMENT, tmp_path)


def trains(tmp_path):
    live.train_on_console(Run(ModelConfig(1, 16, 1), 128, 1e-3, max_steps=5), tmp_path, None)


def branches(tmp_path):
    live.branch_on_console(EXPERIMENT, tmp_path, ["1x16"], 128, 0.01)


@pytest.mark.parametrize("command", [scans, trains, branches])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_save_and_only_ctrl_c_is_an_interruption(command, number, tmp_path, monkeypatch, capsys):
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
        monkeypatch.setattr(live, name, stand_in)
    monkeypatch.setattr(live, "keep_compiled_programs", lambda: None)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        command(tmp_path)
    if number == signal.SIGTERM:
        assert ended.type is SystemExit
        assert ended.value.code == 0
        assert capsys.readouterr().out.endswith("saved; the same command continues where it was\n")
    else:
        assert ended.type is KeyboardInterrupt
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
