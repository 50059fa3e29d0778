"""Several processes train one run, over gloo, and end together."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.training import read_metrics, train
from tests.training.counting import CORPUS, RUN

SECONDS = 240  # for all of a run, on a busy machine
KILLED = {"run": {"max_steps": 100, "eval_growth": 1.05}, "checkpoint_seconds": 0.3}


class Processes:
    """So many processes with so many devices each that train `one_process.RUN` in a folder."""

    def __init__(
        self,
        workdir: Path,
        num_processes: int,
        devices: int,
        port: int | None = None,
        only: int | None = None,
        caches: Path | None = None,
        **settings,
    ):
        """`only` that one of them is started, if given; each has a folder of its own in `caches`, as on a machine."""
        connect = {"coordinator": f"localhost:{port or free_port()}", "num_processes": num_processes}
        common = {"workdir": str(workdir), **connect, **settings}
        command = [sys.executable, "-m", "tests.training.one_process", str(devices)]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.each = [
            subprocess.Popen(
                [*command, json.dumps({**common, "process_id": i})],
                env=environment | ({"SCALING_JAX_CACHE": str(caches / f"machine {i}")} if caches else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in (range(num_processes) if only is None else [only])
        ]

    def wait_until_step(self, step: int) -> None:
        for line in self.each[0].stdout:
            if line.startswith("step") and int(line.split()[1]) >= step:
                return
        raise AssertionError(f"ended before step {step}")

    def outputs(self) -> list[str]:
        try:
            return [process.communicate(timeout=SECONDS)[0] for process in self.each]
        finally:
            for process in self.each:
                process.kill()


def trained(workdir: Path, num_processes: int, devices: int, **settings) -> None:
    run = Processes(workdir, num_processes, devices, **settings)
    for process, output in zip(run.each, run.outputs(), strict=True):
        assert process.returncode == 0, output
        assert "exhausted" in output


def metrics_file(workdir: Path) -> Path:
    return next(workdir.glob("runs/*/metrics.jsonl"))


def assert_same_training(workdir: Path, other: Path):
    lines, others = (read_metrics(metrics_file(x).parent) for x in (workdir, other))
    for name in ("train_loss", "small_sq_norm", "big_sq_norm"):
        series = [np.concatenate([getattr(line, name) for line in each]) for each in (lines, others)]
        np.testing.assert_allclose(*series, rtol=1e-5, err_msg=name)
    losses = [[line.test_loss for line in each if line.evaluated] for each in (lines, others)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_train_what_two_devices_of_one_do(tmp_path):
    changes = {"max_steps": 30, "eval_growth": 1.3}
    trained(tmp_path / "two", 2, 1, run=changes)
    train(dataclasses.replace(RUN, **changes), tmp_path / "one", corpus=CORPUS, num_devices=2)
    assert_same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    "streamed", [pytest.param(False, marks=pytest.mark.long), pytest.param(True, marks=pytest.mark.long)]
)
def test_two_processes_share_a_sharded_state_and_one_goes_on_with_all_of_it(tmp_path, streamed):
    """Stopped in the middle; what comes out is what one process gives undisturbed."""
    changes = {"batch_tokens": 256, "max_steps": 40}
    run = dataclasses.replace(RUN, **changes)
    two = Processes(tmp_path / "cut", 2, 2, run=changes, sharding="fsdp", streamed=streamed)
    two.wait_until_step(14)
    two.each[1].send_signal(signal.SIGTERM)
    for process, output in zip(two.each, two.outputs(), strict=True):
        assert process.returncode == 0, output
        assert "interrupted" in output
    train(run, tmp_path / "cut", corpus=CORPUS, num_devices=4, sharding="fsdp")
    train(run, tmp_path / "whole", corpus=CORPUS, num_devices=4, sharding="fsdp")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.long
def test_sigterm_to_one_of_two_processes_saves_the_run_and_one_process_goes_on_with_it(tmp_path):
    """What comes out is what one process gives undisturbed."""
    run = dataclasses.replace(RUN, max_steps=60)
    two = Processes(tmp_path / "cut", 2, 1, run={"max_steps": 60})
    two.wait_until_step(14)
    two.each[1].send_signal(signal.SIGTERM)
    for process, output in zip(two.each, two.outputs(), strict=True):
        assert process.returncode == 0, output
        assert "interrupted" in output
    steps: list[int] = []
    train(run, tmp_path / "cut", corpus=CORPUS, num_devices=1, on_progress=lambda progress: steps.append(progress.step))
    assert steps[0] > 14
    train(run, tmp_path / "whole", corpus=CORPUS, num_devices=1)
    assert_same_training(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_processes", "devices", "backend", "streamed"), [(2, 2, "shard_map", True), (4, 1, "pmap", False)]
)
def test_four_devices_train_alike_however_many_processes_have_them(tmp_path, num_processes, devices, backend, streamed):
    changes = {"max_steps": 200, "eval_growth": 1.3}
    trained(tmp_path / "several", num_processes, devices, run=changes, backend=backend, streamed=streamed)
    train(dataclasses.replace(RUN, **changes), tmp_path / "one", corpus=CORPUS, num_devices=4)
    assert_same_training(tmp_path / "several", tmp_path / "one")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two processes leave that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    trained(folder, 2, 1, **KILLED)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kill", range(10))
def test_a_process_that_is_killed_ends_the_other_and_the_same_command_repeats_the_same_steps(tmp_path, whole, kill):
    """At a random moment: while the processes start, on the way, or while they save."""
    draws = np.random.default_rng(kill)
    cut = Processes(tmp_path, 2, 1, **KILLED)
    cut.wait_until_step(int(draws.integers(0, 60)))
    time.sleep(draws.uniform(0, 0.3))
    cut.each[kill % 2].kill()
    killed_at = time.monotonic()
    survivor = cut.each[1 - kill % 2]
    assert "a process of this run is gone: run the same command again" in survivor.communicate(timeout=SECONDS)[0]
    assert survivor.returncode not in (0, 2)
    seconds = time.monotonic() - killed_at
    print(f"the other ended after {seconds:.1f} seconds with exit code {survivor.returncode}")
    assert seconds < 90  # a heartbeat's timeout; gloo tells at once
    trained(tmp_path, 2, 1, **KILLED)
    assert metrics_file(whole).read_bytes() == metrics_file(tmp_path).read_bytes()


@pytest.mark.long
def test_processes_with_different_commands_are_refused(tmp_path):
    port = free_port()
    pair = [Processes(tmp_path, 2, 1, port=port, only=i, run={"seed": i}) for i in range(2)]
    for one in pair:
        (output,) = one.outputs()
        assert "the processes of this run differ" in output
        assert one.each[0].returncode != 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
