import dataclasses
import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from scaling_jax.io import UserError
from scaling_jax.io.locks import lock_state, locked
from scaling_jax.training import run_folder, train
from tests.training.counting import CORPUS, RUN

fcntl = pytest.importorskip("fcntl")


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    run = dataclasses.replace(RUN, max_steps=2)
    lock = run_folder(tmp_path, run) / ".lock"
    with (
        locked(lock, "it"),
        pytest.raises(UserError, match=rf"{run.run_id} in {tmp_path} .*process {os.getpid()} of \S+: "),
    ):
        train(run, tmp_path, corpus=CORPUS, num_devices=1)
    assert not (lock.parent / "config.json").exists()

    def look(_):
        with pytest.raises(UserError, match="is in use"):
            locked(lock, "it").__enter__()

    train(run, tmp_path, corpus=CORPUS, num_devices=1, on_progress=look)
    with locked(lock, "it"):  # it is free again
        assert train(run, tmp_path, corpus=CORPUS, num_devices=1).steps == 2  # a result can always be read


def test_what_a_holder_that_has_ended_left_behind_is_waited_for(tmp_path):
    """A scan that was killed, whose workers still save: they hold what they inherited."""
    script = (
        "import subprocess, sys; from pathlib import Path; from scaling_jax.io.locks import locked\n"
        "with locked(Path(sys.argv[1]), 'it') as lock: subprocess.Popen(['cat'], pass_fds=(lock,))"
    )
    # What it leaves behind ends with its input, not after some seconds: a holder may take as long to end.
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path / "lock"], stdin=subprocess.PIPE)
    assert holder.wait() == 0
    with pytest.raises(UserError, match="it is in use by process"):
        locked(tmp_path / "lock", "it", seconds=0.1).__enter__()
    threading.Timer(0.5, holder.stdin.close).start()
    with locked(tmp_path / "lock", "it", seconds=20):
        assert holder.stdin.closed


HOLD = """
import sys; from pathlib import Path; from scaling_jax.io.locks import locked
with locked(Path(sys.argv[1]), "it"): print("held", flush=True); sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `lock` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.stdin.close()
    process.wait()


def test_a_holder_that_lives_is_waited_for_only_where_asked(tmp_path, holder):
    with pytest.raises(UserError, match=f"it is in use by process {holder.pid} of "):
        locked(tmp_path / "lock", "it", seconds=60).__enter__()  # at once
    with pytest.raises(UserError, match=f"it is in use by process {holder.pid} of "):
        locked(tmp_path / "lock", "it", seconds=0.2, wait=True).__enter__()
    threading.Timer(1.0, holder.stdin.close).start()
    with locked(tmp_path / "lock", "it", seconds=60, wait=True):
        assert holder.wait() == 0
        assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} ")


def test_whether_a_lock_is_held_is_seen_without_taking_it(tmp_path, holder):
    assert lock_state(tmp_path / "none") == (False, 0.0)
    state = lock_state(tmp_path / "lock")
    assert state.held
    assert time.time() - state.since < 60
    assert (tmp_path / "lock").read_text().startswith(f"{holder.pid} ")
    holder.stdin.close()
    holder.wait()
    assert lock_state(tmp_path / "lock") == (False, state.since)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path / 'file'}.*choose another folder"):
        locked(tmp_path / "file" / "lock", "it").__enter__()


def test_a_file_system_without_locks_is_refused_only_where_machines_share_it(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", "it"):
        pass
    with pytest.raises(UserError, match=r"can't lock .*No locks available.*: use a file system with locks"):
        locked(tmp_path / "lock", "it", insist=True).__enter__()
