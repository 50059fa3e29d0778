"""Jobs for worker processes, and what becomes of them when a worker refuses, fails or dies."""

import contextlib
import errno
import json
import os
import signal
import threading
import time

import pytest

from scaling_jax.io import UserError
from scaling_jax.io.workers import Command, available_cores, run_jobs

WORKER = """
import errno, os, sys, time
from pathlib import Path
from scaling_jax.io import UserError
from scaling_jax.io.workers import serve

def work(job, send):
    Path(sys.argv[1], "given").open("a").write(f"{job} {os.getpid()}\\n")
    what = job if isinstance(job, str) else "say"
    if what == "refuse":
        raise UserError("no text in a.txt: give another")
    if what == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/00001.train")
    if what == "fail":
        raise RuntimeError("out of patience")
    if what == "die":
        print("too much memory", file=sys.stderr, flush=True)
        os._exit(7)
    if what == "leave":
        return False
    if what == "wait":
        while not Path(sys.argv[1], "asked").exists():
            time.sleep(0.01)
    print("a library's own words")
    send({"at": job})
    return True

serve(work, on_end=lambda: Path(sys.argv[1], "asked").touch())
"""


@pytest.fixture
def commands(tmp_path):
    return lambda count, **settings: [Command(("-c", WORKER, str(tmp_path)), **settings)] * count


def given(folder):
    """(job, process) in the order in which workers took them."""
    lines = (folder / "given").read_text().splitlines()
    return [tuple(line.rsplit(" ", 1)) for line in lines]


@pytest.mark.parametrize(("jobs", "workers"), [(7, 2), (1, 3), (0, 2)])
def test_each_job_is_given_to_one_worker_once(tmp_path, commands, jobs, workers):
    done, said = [], []
    run_jobs(list(range(jobs)), commands(workers), on_done=done.append, on_message=said.append)
    assert sorted(done) == list(range(jobs))
    assert sorted(message["at"] for message in said) == list(range(jobs))
    if jobs:
        taken = given(tmp_path)
        assert sorted(job for job, _ in taken) == sorted(map(str, range(jobs)))
        assert 1 <= len({process for _, process in taken}) <= min(jobs, workers)


def test_a_slow_job_holds_up_its_own_worker_alone(tmp_path, commands):
    """The others take all that is left; it ends once they are through."""

    def on_done(job):
        done.append(job)
        if len(done) == 5:
            (tmp_path / "asked").touch()

    done: list = []
    run_jobs(["wait", 1, 2, 3, 4, 5], commands(2), on_done=on_done)
    assert done == [1, 2, 3, 4, 5, "wait"]


def test_jobs_that_come_up_later_go_to_workers_that_are_free_and_to_new_ones(tmp_path, commands):
    done: list = []

    def further(job):
        return [10, 11, "wait"] if job == 1 else [12] if job == 10 else []

    def on_done(job):
        done.append(job)
        if len(done) == 4:
            (tmp_path / "asked").touch()

    run_jobs([1], commands(3), on_done=on_done, further=further)
    assert sorted(done, key=str) == [1, 10, 11, 12, "wait"]
    assert done[0] == 1
    assert done[-1] == "wait"  # held up nobody else
    assert 2 <= len({process for _, process in given(tmp_path)}) <= 3


@pytest.mark.parametrize("how", ["die", "fail"])
def test_a_worker_that_dies_is_named_with_the_last_line_of_its_log(tmp_path, commands, how):
    log = tmp_path / "logs" / "0.log"
    code, last = (7, "too much memory") if how == "die" else (1, "RuntimeError: out of patience")
    done: list = []
    with pytest.raises(UserError, match=rf"exit code {code}.*{last}.*{log}"):
        run_jobs([1, how, 2], commands(1, log=log), on_done=done.append)
    assert done == [1]
    assert "a library's own words" in log.read_text()
    assert [job for job, _ in given(tmp_path)] == ["1", how]


@pytest.mark.parametrize("where", ["before it takes jobs", "in a job"])
def test_a_worker_that_dies_is_named_with_its_error_not_with_what_jax_prints_after_it(where, tmp_path):
    """JAX adds a paragraph to every traceback; and a job's error may have several lines."""
    fail = "raise ValueError('seed 4294967295\\nis too large')"
    code = (
        "import sys; from scaling_jax.io.workers import serve\n"
        "def hook(kind, error, trace): print(f'{kind.__name__}: {error}\\n--\\nFor simplicity, …', file=sys.stderr)\n"
        "sys.excepthook = hook\n"
    ) + (
        f"{fail}\n"
        if where == "before it takes jobs"
        else f"def work(job, send):\n  {fail}\nserve(work, lambda: None)\n"
    )
    with pytest.raises(UserError, match=r"\(exit code 1\): ValueError: seed 4294967295") as died:
        run_jobs([1], [Command(("-c", code), log=tmp_path / "0.log")], on_done=pytest.fail)
    assert "For simplicity" not in str(died.value)
    assert "\n" not in str(died.value)


def test_a_worker_that_was_killed_is_named_with_its_signal(tmp_path):
    code = "import os; from scaling_jax.io.workers import serve; serve(lambda job, send: os.kill(os.getpid(), 9), None)"
    with pytest.raises(UserError, match=r"SIGKILL; .*memory"):
        run_jobs([1], [Command(("-c", code), log=tmp_path / "0.log")], on_done=pytest.fail)


def test_a_worker_that_dies_without_a_log_is_named_with_its_exit_code(commands, capfd):
    with pytest.raises(UserError, match="exit code 7"):
        run_jobs(["die"], commands(1), on_done=pytest.fail)
    assert "too much memory" in capfd.readouterr().err


def test_a_worker_that_leaves_in_the_middle_of_a_job_has_not_done_it(commands):
    with pytest.raises(UserError, match="exit code 0"):
        run_jobs(["leave"], commands(1), on_done=pytest.fail)


def test_what_a_worker_refuses_arrives_in_its_words(tmp_path, commands):
    with pytest.raises(UserError, match=r"^no text in a\.txt: give another$"):
        run_jobs(["refuse", "wait"], commands(2), on_done=pytest.fail)
    assert not running(tmp_path), "the other worker was asked to leave, and waited for"


def test_a_full_disk_arrives_as_the_error_that_it_is(commands):
    with pytest.raises(OSError, match="No space left") as failed:
        run_jobs(["full"], commands(1), on_done=pytest.fail)
    assert failed.value.errno == errno.ENOSPC
    assert failed.value.filename == "/disk/00001.train"


def test_a_log_into_which_nothing_was_written_is_removed(tmp_path, commands):
    quiet = "from scaling_jax.io.workers import serve; serve(lambda job, send: True, on_end=lambda: None)"
    log = tmp_path / "logs" / "0.log"
    run_jobs([1], [Command(("-c", quiet), log=log)], on_done=lambda _: None)
    assert not log.exists()
    run_jobs([1], commands(1, log=log), on_done=lambda _: None)
    assert log.read_text() == "a library's own words\n"


def test_ctrl_c_asks_workers_to_leave_and_waits_for_them(tmp_path, commands):
    """They aren't interrupted themselves: each ends its job, or saves it."""
    seen = []

    def interrupt():
        while not (tmp_path / "given").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(["wait"], commands(1), on_done=pytest.fail, on_interrupt=lambda: seen.append("interrupted"))
    thread.join()
    assert seen == ["interrupted"]
    assert not running(tmp_path)


def test_workers_have_their_own_environment_and_core(tmp_path):
    code = (
        "import os; from scaling_jax.io.workers import serve\n"
        "def work(job, send):\n"
        "    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None\n"
        "    send({'here': [os.environ.get('COLOUR'), os.environ.get('HOME'), cores]}); return True\n"
        "serve(work, on_end=lambda: None)"
    )
    core = available_cores()[-1]
    said = []
    run_jobs(
        [1],
        [Command(("-c", code), environment={"COLOUR": "red"}, core=core)],
        on_done=lambda _: None,
        on_message=said.append,
    )
    assert json.loads(json.dumps(said)) == [{"here": ["red", None, None if core is None else [core]]}]


def running(folder):
    """Workers that took a job and live."""
    alive = []
    for _, process in given(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), 0)
            alive.append(process)
    return alive
