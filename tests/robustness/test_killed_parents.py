"""Workers whose parent was killed: nobody reads what they say any more, and they save what they have."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling_jax.scanning.experiment import QUICK
from scaling_jax.scanning.records import write_experiment
from scaling_jax.scanning.worker import _START

WORKER = """
import os, sys, time
from pathlib import Path
from scaling_jax.io.workers import serve

folder, ended = Path(sys.argv[1]), []

def work(job, send):
    send({"at": os.getpid()})
    while not ended:
        time.sleep(0.01)
    for k in range(100):  # of the evaluations that end meanwhile; together more than a pipe or a buffer holds
        send({"at": k, "with": "x" * 1000})
    (folder / f"saved-{job}").write_text("saved")
    return False

serve(work, lambda: ended.append(True))
(folder / f"left-{os.getpid()}").write_text("quietly")
"""
PARENT = """
import sys
from pathlib import Path
from scaling_jax.io.workers import Command, run_jobs

folder = Path(sys.argv[1])
commands = [Command(("-c", sys.argv[2], str(folder)), log=folder / f"{k}.log") for k in range(2)]
run_jobs([0, 1], commands, on_done=print, on_message=lambda message: print(message["at"], flush=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX's signals")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGABRT"])
def test_workers_save_and_end_quietly(how, tmp_path):
    arguments = [sys.executable, "-c", PARENT, tmp_path, WORKER]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        workers = {int(parent.stdout.readline()) for _ in range(2)}
        parent.send_signal(getattr(signal, how))
        parent.wait(60)
    wait_for(lambda: all(ended(worker) for worker in workers))
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert {path.name for path in tmp_path.glob("left-*")} == {f"left-{worker}" for worker in workers}
    assert [path.read_text() for path in tmp_path.glob("*.log")] == ["", ""]


@pytest.mark.long
def test_a_worker_of_a_scan_saves_its_run(tmp_path):
    """The pipes break at an evaluation; a checkpoint of this or a later step is there when the worker has ended."""
    folder = tmp_path / "scan"
    write_experiment(folder, QUICK)
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"SCALING_JAX_CACHE": str(tmp_path / "cache")},
        )
        worker.stdin.write(json.dumps(list(QUICK.cells[-1])) + "\n")
        worker.stdin.flush()
        step = json.loads(worker.stdout.readline())["progress"]["step"]
        worker.stdout.close()
        worker.stdin.close()
        assert worker.wait(200) == 0
    assert (tmp_path / "log").read_text() == ""
    saved = [int(path.name) for path in folder.glob("runs/*/checkpoints/*")]
    assert max(saved) >= step


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def ended(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{process}/stat")  # a zombie that nobody waits for has ended, too
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"
