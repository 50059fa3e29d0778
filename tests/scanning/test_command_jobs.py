"""A study trained by a command on several machines; here they are jobs of submitit and Ray on this one."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from scaling_jax.io import UserError
from scaling_jax.results import read_results
from scaling_jax.scanning import Study, executors
from scaling_jax.scanning.by_command import Limits, train_by_command
from scaling_jax.scanning.command_jobs import CommandJob, train_by_command_on
from tests.scanning.test_by_command import COMMAND, ROOT, SMALL, by_command


@pytest.fixture(autouse=True)
def from_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(executors, "_POLL_SECONDS", 0.1)


@pytest.fixture(scope="module")
def on_one_machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    here = Path.cwd()
    os.chdir(ROOT)
    by_command(folder)
    os.chdir(here)
    return folder


def records(folder):
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "runs").rglob("*.json*")}


def scan_on(executor, folder, fault="", jobs=3, retries=2, **further):
    said, events = [], []
    study = Study(SMALL, folder)
    train_by_command_on(
        executor,
        study,
        f"{COMMAND} {fault}",
        Limits(jobs, retries),
        say=said.append,
        on_event=events.append,
        **further,
    )
    return said, events


@pytest.mark.slow
def test_jobs_of_submitit_make_the_records_of_one_machine(on_one_machine, tmp_path):
    said, events = scan_on("slurm", tmp_path, "dies-once", cluster="local")
    assert Study(SMALL, tmp_path).done
    assert records(tmp_path) == records(on_one_machine)
    assert {event.cell.batch_tokens for event in events if event.progress is None} == {8, 64, 512}
    assert said
    assert all("exit code 1; started again" in line for line in said)


@pytest.mark.long
def test_a_job_that_is_preempted_is_queued_again(on_one_machine, tmp_path):
    def preempt():
        while not (markers := list(tmp_path.glob("commands/*/marker"))):
            time.sleep(0.05)
        with open(f"/proc/{markers[0].read_text()}/stat") as file:
            os.kill(int(file.read().rsplit(")", 1)[1].split()[1]), signal.SIGUSR2)

    thread = threading.Thread(target=preempt)
    thread.start()
    scan_on("slurm", tmp_path, jobs=1, cluster="local", options={"timeout_min": 10})
    thread.join()
    (log,) = (tmp_path / "logs" / "slurm").glob("*_log.out")
    assert "Requeued job" in log.read_text()
    assert records(tmp_path) == records(on_one_machine)


@pytest.mark.long
def test_ray_makes_the_records_of_one_machine(on_one_machine, tmp_path):
    pytest.importorskip("ray")
    scan_on("ray", tmp_path)
    assert records(tmp_path) == records(on_one_machine)


def test_a_job_says_what_happens_in_its_log(tmp_path):
    Study(SMALL, tmp_path)
    job = CommandJob(tmp_path, "no-such-program {batch} {learning_rate} {curve}", Limits(), Path.cwd(), 0)
    assert "can't be started" in job()
    job = CommandJob(tmp_path, f"{COMMAND} dies-once", Limits(), Path.cwd(), 0)
    assert job() is None
    lines = job.log.read_text().splitlines()
    assert any('"said"' in line for line in lines)
    assert sum('"progress": null' in line for line in lines) == 3


def test_workers_that_leave_different_settings_do_not_wait_for_each_other(tmp_path):
    """Each of two workers keeps a setting that failed; neither tries the other's, or waits for it."""
    errors, said = [], []

    def worker(study):
        try:
            train_by_command(study, f"{COMMAND} dies", Limits(retries=0), say=said.append)
        except UserError as error:
            errors.append(str(error))

    workers = [threading.Thread(target=worker, args=(Study(SMALL, tmp_path),)) for _ in range(2)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(60)
    assert not any(thread.is_alive() for thread in workers)
    assert len(errors) == 2
    assert len(said) == 3  # each of three settings, once
    assert not read_results(tmp_path).runs
    train_by_command(Study(SMALL, tmp_path), COMMAND, Limits(jobs=3))  # once it is mended, all are tried again
    assert Study(SMALL, tmp_path).done


def test_a_missing_engine_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"submitit: pip install"):
        scan_on("slurm", tmp_path)
