"""The next stage's program is compiled while the present one trains; that changes nothing else."""

import contextlib
import dataclasses
import threading
import time

import jax
import pytest

from scaling_jax.data import feeding
from scaling_jax.training import Interrupted, LiveRamp, Stage, ahead, integrity, read_metrics, run_folder, train
from scaling_jax.training import program as programs
from scaling_jax.training.ahead import Ahead, compiling, program_to_come
from scaling_jax.training.attempt import Attempt
from scaling_jax.training.journal import position
from scaling_jax.training.program import Program, program_for
from tests.training.counting import CORPUS, RUN

RAMP = dataclasses.replace(RUN, batch_tokens=64, max_steps=None, max_tokens=4_096, ramp=(Stage(2_048, 256, 2.0),))
LIVE = dataclasses.replace(RAMP, ramp=(), live_ramp=LiveRamp(threshold=1e-3, max_batch_tokens=128, every_steps=30))


@contextlib.contextmanager
def monitored():
    """A list to which each compilation adds whether the training thread waits for it."""
    events = []

    def listen(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            events.append(threading.current_thread() is threading.main_thread())

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def compiled(monkeypatch):
    """(batch in sequences, compilations that the training thread waited for) of each call of the program."""
    programs.compiled_steps.cache_clear()
    calls, steps = [], Program.steps
    with monitored() as events:

        def counted(self, *args, **options):
            before = len(events)
            found = steps(self, *args, **options)
            calls.append((self.batch_sequences, sum(events[before:])))
            return found

        monkeypatch.setattr(Program, "steps", counted)
        yield calls


def waited_for(calls):
    """{batch in sequences: compilations inside of calls with it}."""
    return {batch: sum(own for b, own in calls if b == batch) for batch, _ in calls}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_devices": 2, "backend": "shard_map"}, marks=pytest.mark.slow),
        pytest.param({"num_devices": 2, "own_rows": True}, marks=pytest.mark.long),
        pytest.param({"num_devices": 2, "sharding": "fsdp"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_stage_begins_without_waiting_for_a_compilation(options, tmp_path, compiled, monkeypatch):
    if options.pop("own_rows", False):
        monkeypatch.setattr(feeding, "RESIDENT_BYTES", 0)
    train(RAMP, tmp_path, corpus=CORPUS, **options)
    assert waited_for(compiled) == {4: 1, 16: 0}


def test_a_live_ramp_doubles_without_waiting_for_a_compilation(tmp_path, compiled):
    train(LIVE, tmp_path, corpus=CORPUS, num_devices=1)
    assert waited_for(compiled) == {4: 1, 8: 0}


def test_it_changes_no_result_and_without_it_the_stage_waits(tmp_path, compiled):
    train(RAMP, tmp_path / "with", corpus=CORPUS, num_devices=1)
    assert waited_for(compiled) == {4: 1, 16: 0}
    programs.compiled_steps.cache_clear()
    compiled.clear()
    train(RAMP, tmp_path / "without", corpus=CORPUS, num_devices=1, compile_ahead=False)
    assert waited_for(compiled) == {4: 1, 16: 1}
    for name in ("metrics.jsonl", "result.json"):
        ahead_of, behind = ((run_folder(tmp_path / w, RAMP) / name).read_bytes() for w in ("with", "without"))
        assert ahead_of == behind


@pytest.fixture
def endless(monkeypatch):
    """A compilation that ends when the test says so."""
    end = threading.Event()
    monkeypatch.setattr(ahead, "_compilation", lambda *_: end.wait)
    yield end
    end.set()


def test_an_interrupt_does_not_wait_for_the_compilation_and_the_run_goes_on_later(tmp_path, endless, monkeypatch):
    """Nor does saving compile anything meanwhile, which on a CPU would wait behind the thread."""
    train(RAMP, tmp_path / "whole", corpus=CORPUS, num_devices=1, compile_ahead=False)
    sums = integrity._weighted_sums.__wrapped__
    monkeypatch.setattr(integrity, "_weighted_sums", jax.jit(lambda *leaf: sums(*leaf)))  # as in a new process
    behind, save = [], Attempt.save

    def saves(self, state):
        with monitored() as events:
            save(self, state)
        behind.append(sum(events))

    monkeypatch.setattr(Attempt, "save", saves)
    boundary = RAMP.ramp[0].tokens

    def waits_at_the_boundary():
        return read_metrics(run_folder(tmp_path / "cut", RAMP))[-1].tokens == boundary

    with pytest.raises(Interrupted):
        train(RAMP, tmp_path / "cut", corpus=CORPUS, num_devices=1, should_stop=waits_at_the_boundary)
    assert compiling()
    assert behind == [0]
    endless.set()
    train(RAMP, tmp_path / "cut", corpus=CORPUS, num_devices=1)
    whole, cut = ((run_folder(tmp_path / w, RAMP) / "metrics.jsonl").read_bytes() for w in ("whole", "cut"))
    assert whole == cut


def test_while_a_stage_waits_it_can_be_stopped(endless):
    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    program, state = program_for(RAMP), {"w": jax.numpy.zeros(3)}
    waiting = Ahead()
    waiting.expect(program, state, state, False)
    waiting.wait(program_for(RAMP.at(RAMP.ramp[0])), stop)  # another program isn't waited for
    with pytest.raises(Stopped):
        waiting.wait(program, stop)
    endless.set()
    waiting.wait(program, lambda: time.sleep(0.01))
    assert not compiling()


def test_an_error_of_the_thread_is_left_to_the_stage(tmp_path, monkeypatch):
    def fails(*_):
        def compile_steps():
            raise RuntimeError("no memory")

        return compile_steps

    monkeypatch.setattr(ahead, "_compilation", fails)
    result = train(RAMP, tmp_path, corpus=CORPUS, num_devices=1)
    assert (result.status, result.tokens) == ("exhausted", 4_096)


def test_the_program_to_come_is_that_of_the_next_stage_with_another_program():
    shrinks = dataclasses.replace(
        RAMP, betas="run", ramp=(Stage(640, 64, 0.5), Stage(1_280, 32), Stage(2_560, 256)), max_tokens=2_560
    )
    to_come = [
        program_to_come(run, position(run, []), program_for)
        for run in (RUN, RAMP, LIVE, shrinks, dataclasses.replace(RAMP, ramp=(Stage(4_096, 128),)))
    ]
    assert [None if p is None else p.batch_sequences for p in to_come] == [None, 16, 8, 2, None]
    late = dataclasses.replace(RAMP, max_tokens=None, max_steps=32)  # ends where the stage would begin
    assert program_to_come(late, position(late, []), program_for) is None
    assert program_to_come(dataclasses.replace(late, max_steps=33), position(late, []), program_for) is not None
    late_live = dataclasses.replace(LIVE, live_ramp=LiveRamp(1.0, max_batch_tokens=256, factor=4))
    assert program_to_come(late_live, position(late_live, []), program_for).batch_sequences == 16
    full = dataclasses.replace(LIVE, batch_tokens=128)
    assert program_to_come(full, position(full, []), program_for) is None
    assert to_come[1] == program_for(RAMP.at(RAMP.ramp[0]))
