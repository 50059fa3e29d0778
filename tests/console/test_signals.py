"""Signals while a command starts, compiles and trains: said at once, and ended with the promised code."""

import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import pytest

from scaling_jax.console import commands
from scaling_jax.console.signals import before_training
from scaling_jax.scanning import Event, cells
from scaling_jax.scanning.experiment import QUICK
from scaling_jax.training import Progress

PREAMBLE = """
import signal, sys, time
from scaling_jax.console.signals import before_training, heard_at_once, leave
def say(line):
    print(line, flush=True)
def deaf(seconds):
    "As a compilation: no Python instruction ends meanwhile."
    import ctypes
    end = time.monotonic() + seconds
    ctypes.CDLL(None).usleep(int(seconds * 1e6))  # returns early on a signal
    while time.monotonic() < end:
        ctypes.CDLL(None).usleep(int((end - time.monotonic()) * 1e6) + 1)
"""


def ends(code, number, tmp_path):
    """(exit code, output, seconds) of a process that gets a signal once it says that it is ready."""
    started = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/bin", "PYTHONPATH": ":".join(sys.path), "SCALING_JAX_SAVED": str(tmp_path / "saved")},
    )
    assert started.stdout.readline() == "ready\n"
    time.sleep(0.2)
    start = time.monotonic()
    started.send_signal(number)
    output, _ = started.communicate(timeout=60)
    return started.returncode, output, time.monotonic() - start


def test_sigterm_before_training_ends_with_0_and_is_marked_as_saved(tmp_path):
    code = """
        with before_training():
            say("ready")
            time.sleep(50)
    """
    status, output, _ = ends(code, signal.SIGTERM, tmp_path)
    assert status == 0
    assert "same command" in output
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_during_the_first_compilation_ends_it_at_once(number, status, tmp_path):
    code = """
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: None)
        with heard_at_once(say, lambda: True):
            say("ready")
            deaf(50)
    """
    found, output, seconds = ends(code, number, tmp_path)
    assert found == status
    assert seconds < 20
    assert "before the first step" in output
    assert (tmp_path / "saved").exists() == (number == signal.SIGTERM)


def test_a_signal_that_has_to_wait_is_said_at_once(tmp_path):
    code = """
        came = []
        signal.signal(signal.SIGINT, lambda *_: came.append(1))
        with heard_at_once(say):
            say("ready")
            deaf(3)
            say(f"call ended {len(came)}")
        say("saved")
    """
    status, output, seconds = ends(code, signal.SIGINT, tmp_path)
    assert status == 0
    assert seconds > 2
    assert [line.split(":")[0].split(" ")[0] for line in output.splitlines()] == ["Ctrl-C", "call", "saved"]
    assert "saving" in output.splitlines()[0]


@pytest.mark.parametrize("where", ["collector", "weak reference", "destructor"])
def test_ctrl_c_where_python_ignores_what_is_raised_is_not_lost(where):
    """Python would print that it ignores the exception, and go on."""
    sent = []

    def press(*_):
        if not sent:
            sent.append(where)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # the handler runs here at the latest

    class Thing:
        if where == "destructor":
            __del__ = press

    def collect():
        thing = Thing()
        reference = weakref.ref(thing, press if where == "weak reference" else None)
        del thing
        gc.collect()
        time.sleep(5)
        del reference

    if where == "collector":
        gc.callbacks.append(press)
    try:
        with before_training(), pytest.raises(KeyboardInterrupt):
            collect()
    finally:
        if where == "collector":
            gc.callbacks.remove(press)
    assert sent
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_command_does_not_wait_for_the_compilation_of_a_stage_to_come(number, status, tmp_path):
    """Nor is it aborted: Python's end would be, with another exit code, once XLA returns to the thread."""
    code = """
        import threading
        from scaling_jax.cli import main
        from scaling_jax.training import ahead
        def command(**_):
            thread = threading.Thread(target=deaf, args=(50,), daemon=True)
            ahead._threads.append(thread)
            thread.start()
            try:
                say("ready")
                while True:
                    time.sleep(0.1)
            finally:
                sys.stdout.write("saved")
        main.app.cli = command
        sys.argv = ["scaling-jax", "train"]
        main.main()
    """
    found, output, seconds = ends(code, number, tmp_path)
    assert found == status
    assert seconds < 20
    assert "saved" in output


def progress_of(run_id, tokens):
    return Progress("1x16", 512, 1e-3, 0, run_id, tokens // 512, 100, tokens, 3.0, 1e5, math.nan)


def test_a_scan_with_a_limit_stops_then_and_says_that_it_is_too_early(monkeypatch, tmp_path, capsys):
    def waits(*args, **options):
        time.sleep(30)

    monkeypatch.setattr(commands, "scan", waits)
    began = time.monotonic()
    assert not commands.scan_on_console(QUICK, tmp_path, minutes=0.02)
    assert 1 < time.monotonic() - began < 10
    said = " ".join(capsys.readouterr().out.split())
    assert "0.02 minutes are over, and no model has 3 batch sizes, the least for a fit; run the same command" in said


def test_a_scan_with_a_limit_of_tokens_stops_at_the_evaluation_that_reaches_it(monkeypatch, tmp_path, capsys):
    told = []

    def trains(*args, on_event, outwards, **options):
        assert outwards
        for run, tokens in (("a", 300), ("a", 600), ("b", 300), ("b", 500), ("b", 900)):
            told.append((run, tokens))
            on_event(Event(QUICK.cells[0], progress_of(run, tokens)))
        time.sleep(30)

    monkeypatch.setattr(commands, "scan", trains)
    assert not commands.scan_on_console(QUICK, tmp_path, tokens=1_000)
    assert told[-1] == ("b", 500)
    assert "1,000 tokens are trained, and no model has" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("done", "models", "batches"),
    [
        ({"1x16": (512, 1_024, 2_048), "1x32": (512, 1_024, 2_048, 4_096)}, 2, (512, 1_024, 2_048)),
        ({"1x16": (512, 1_024), "1x32": (512, 1_024, 2_048, 4_096)}, 1, (512, 1_024, 2_048, 4_096)),
    ],
)
def test_what_is_done_at_its_limit_becomes_the_scan(done, models, batches, monkeypatch, tmp_path, capsys):
    asked = []

    def scan(experiment, *args, **options):
        asked.append(experiment)
        if len(asked) == 1:
            time.sleep(30)

    monkeypatch.setattr(commands, "scan", scan)
    monkeypatch.setattr(
        cells, "finished_runs", lambda _, cell, __: () if cell.batch_tokens in done[cell.model] else None
    )
    assert commands.scan_on_console(QUICK, tmp_path, minutes=0.02)
    assert (len(asked[1].subjects), asked[1].batch_tokens) == (models, batches)
    assert f"at {len(batches)} of 7 batch sizes; run the same command" in " ".join(capsys.readouterr().out.split())


def test_a_scan_that_ends_before_its_limit_is_not_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "scan", lambda *args, **options: time.sleep(0.1))
    assert commands.scan_on_console(QUICK, tmp_path, minutes=0.01)
    time.sleep(1)  # SIGTERM would end the process
