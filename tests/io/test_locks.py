import dataclasses
import errno
import os
import subprocess
import sys

import pytest

from scaling_jax.io import UserError
from scaling_jax.io.locks import locked
from scaling_jax.training import run_folder, train
from tests.training.counting import CORPUS, RUN

fcntl = pytest.importorskip("fcntl")


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    run = dataclasses.replace(RUN, max_steps=2)
    lock = run_folder(tmp_path, run) / ".lock"
    with (
        locked(lock, "it"),
        pytest.raises(UserError, match=rf"^run {run.run_id} in {tmp_path} is in use by process {os.getpid()} of \S+: "),
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
        "with locked(Path(sys.argv[1]), 'it') as lock: subprocess.Popen(['sleep', '2'], pass_fds=(lock,))"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "lock"], check=True)
    with pytest.raises(UserError, match="it is in use by process"):
        locked(tmp_path / "lock", "it", seconds=0.1).__enter__()
    with locked(tmp_path / "lock", "it", seconds=20):
        pass


def test_a_file_system_without_locks_is_refused_only_where_machines_share_it(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", "it"):
        pass
    with pytest.raises(UserError, match=r"can't lock .*No locks available.*: use a file system with locks"):
        locked(tmp_path / "lock", "it", between_machines=True).__enter__()
