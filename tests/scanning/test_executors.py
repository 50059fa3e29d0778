import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from scaling_jax.io import UserError
from scaling_jax.scanning import Cell, Event, Experiment, LearningRates, Subject, executors
from scaling_jax.scanning.records import write_experiment, write_search
from scaling_jax.scanning.worker import event_message, read_event, train_in_workers
from scaling_jax.tasks import model_config
from scaling_jax.training import Progress

CELL, OTHER = Cell("1x16", 256, 0), Cell("1x16", 320, 0)


def test_a_cell_is_trained_by_one_process_at_a_time(tmp_path):
    with executors.locked_cell(tmp_path, CELL):
        with pytest.raises(UserError, match=rf"1x16 · 256 tokens of .* is in use by process {os.getpid()} of "):
            executors.locked_cell(tmp_path, CELL, seconds=0.1).__enter__()
        with executors.locked_cell(tmp_path, OTHER, seconds=0.1):
            pass
    with executors.locked_cell(tmp_path, CELL, seconds=0.1):
        pass


def saving(lock):
    """A process that keeps a lock until its input ends, as a worker does whose parent is gone."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))


def test_a_process_that_is_still_saving_keeps_the_cell_when_its_parent_is_gone(tmp_path):
    with executors.locked_cell(tmp_path, CELL) as lock:
        first = saving(lock)
    with pytest.raises(UserError, match=r"1x16 · 256 tokens of .* is in use"):
        executors.locked_cell(tmp_path, CELL, seconds=0.1).__enter__()
    first.communicate(b"\n")
    with executors.locked_cell(tmp_path, CELL, seconds=0.1):
        pass


def test_whoever_comes_second_waits_for_the_first(tmp_path):
    with executors.locked_cell(tmp_path, CELL) as lock:
        first = saving(lock)
    order = []

    def come_second():
        with executors.locked_cell(tmp_path, CELL, seconds=20):
            order.append("second")

    second = threading.Thread(target=come_second)
    second.start()
    time.sleep(0.5)
    order.append("first")  # is about to let go
    first.communicate(b"\n")
    second.join(30)
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("engine", "module", "extra"),
    [("ray", "ray", "ray"), ("slurm", "submitit", "slurm")],
)
def test_a_missing_engine_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, engine, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module}: pip install 'scaling-jax\[{extra}\]'"):
        executors.train_cells(engine, tmp_path, [CELL], print)


def test_slurm_is_asked_for_an_array_that_is_queued_again_when_a_machine_dies(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "sacct"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/bash\ncp "$1" {tmp_path}/submitted\necho "invalid partition: x" >&2\nexit 1\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    options = executors.parse_options(["slurm_partition=x", "gpus_per_node=2", "timeout_min=30"])
    with pytest.raises(UserError, match=r"SLURM .*invalid partition: x") as refused:
        executors.train_cells("slurm", tmp_path, [CELL, OTHER], print, options)
    assert "\n" not in str(refused.value)
    script = (tmp_path / "submitted").read_text()
    for line in ("--array=0-1%2", "--requeue", "--signal=USR2@90", "--partition=x", "--gpus-per-node=2", "--time=30"):
        assert f"#SBATCH {line}\n" in script, script


def test_slurm_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine"):
        executors.train_cells("slurm", tmp_path, [CELL], print)


def test_an_unknown_option_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"SLURM .*speed"):
        executors.train_cells("slurm", tmp_path, [CELL], print, {"speed": 3}, cluster="local")
    with pytest.raises(UserError, match=r"'num_gpus' .*key=value"):
        executors.parse_options(["num_gpus"])


def test_an_option_that_ray_does_not_know_is_refused(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"Ray .*speed"):
        executors.train_cells("ray", tmp_path, [CELL], print, {"speed": 3})


def test_options_are_numbers_where_they_can_be():
    pairs = ["num_gpus=1", "slurm_partition=gpu", "slurm_time=12:00:00", "num_cpus=0.5", "retry_exceptions=true"]
    assert executors.parse_options(pairs) == {
        "num_gpus": 1,
        "slurm_partition": "gpu",
        "slurm_time": "12:00:00",
        "num_cpus": 0.5,
        "retry_exceptions": True,
    }


def progress(cell, step):
    values = {"learning_rate": 1e-2, "run_id": "x", "last_step": 9, "tokens": 256 * step, "test_loss": 3.0}
    return Event(cell, Progress(*cell[:2], seed=0, step=step, tokens_per_second=1.0, noise_scale_tokens=2.0, **values))


def test_events_of_other_machines_are_passed_on_and_a_refusal_cancels_the_rest(tmp_path):
    """An earlier scan's events are not; a line is passed on once it is whole."""
    job, other = (executors.CellJob(tmp_path, tmp_path, cell) for cell in (CELL, OTHER))
    log = job.log
    log.parent.mkdir()
    earlier, first, second = (json.dumps(event_message(progress(CELL, step))) + "\n" for step in (1, 2, 3))
    log.write_text(earlier)
    rounds, seen, cancelled = [], [], []

    def ended():
        rounds.append(None)
        with log.open("a") as file:
            file.write([first + second[:30], second[30:], ""][len(rounds) - 1])
        return [[], [(job, None)], [(other, "batch of 3 tokens")]][len(rounds) - 1]

    listener = executors.Listener(lambda message: seen.append(read_event(message)), seen.append, print)
    with pytest.raises(UserError, match="batch of 3 tokens"):
        executors._watch([job, other], listener, ended, lambda: cancelled.append(True))
    assert seen == [progress(CELL, 2), progress(CELL, 3), job]
    assert cancelled == [True]


def test_an_event_comes_back_from_its_line_where_no_noise_scale_was_resolved():
    event = progress(CELL, 2)
    unresolved = Event(CELL, dataclasses.replace(event.progress, noise_scale_tokens=math.nan, test_loss=math.nan))
    line = json.dumps(event_message(unresolved), allow_nan=False)
    assert repr(read_event(json.loads(line))) == repr(unresolved)


@pytest.fixture
def watched_closely(monkeypatch):
    """So that a cell is still being trained when its first event is seen."""
    monkeypatch.setattr(executors, "_POLL_SECONDS", 0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(experiment, results of a worker process of this machine); every other engine must leave the same bytes."""
    folder = tmp_path_factory.mktemp("engines")
    os.environ["SCALING_JAX_CACHE"] = str(folder / "cache")
    for k in range(40):
        (folder / f"{k}.txt").write_text("".join(chr(97 + (k * j * j) % 23) for j in range(4_000)))
    subject = Subject(model_config("1x16"), (0.1,), LearningRates(1e-2, 1_000, most=1))
    experiment = Experiment("tiny", (subject,), (256, 320, 384), max_tokens=300_000, text=f"files:{folder}/*.txt")
    results = new_results(folder / "undisturbed", experiment)
    train_in_workers(results, experiment.cells[:2], lambda _: None, [None])
    return experiment, results


def new_results(folder, experiment):
    folder.mkdir()
    write_experiment(folder, experiment)
    return folder


def assert_same_runs(undisturbed, results, count):
    expected, runs = undisturbed[1] / "runs", list((results / "runs").iterdir())
    assert len(runs) == count
    for run in runs:
        for name in ("result.json", "metrics.jsonl"):
            assert (run / name).read_bytes() == (expected / run.name / name).read_bytes()


def owner(results, cell):
    return int((results / "logs" / f"{cell.file_name}.lock").read_text().split()[0])


@pytest.mark.long
def test_ray_trains_a_cell_again_when_its_node_is_killed(undisturbed, watched_closely, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    results = new_results(tmp_path / "results", undisturbed[0])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    killed, done = {}, []

    def on_event(event):
        if event.progress is None:
            done.append(event.cell)
        elif not killed:
            killed[event.cell] = owner(results, event.cell)
            with open(f"/proc/{killed[event.cell]}/stat") as file:
                raylet = int(file.read().rsplit(")", 1)[1].split()[1])
            (node,) = (n for n in nodes if n.all_processes["raylet"][0].process.pid == raylet)
            cluster.remove_node(node, allow_graceful=False)

    try:
        executors.train_cells("ray", results, undisturbed[0].cells[:2], on_event)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(done) == [CELL, OTHER]
    ((cell, first_owner),) = killed.items()
    assert owner(results, cell) != first_owner
    assert_same_runs(undisturbed, results, 2)


@pytest.mark.long
def test_a_submitit_job_that_is_preempted_is_queued_again_and_continues(undisturbed, watched_closely, tmp_path):
    results = new_results(tmp_path / "results", undisturbed[0])
    preempted = []

    def on_event(event):
        if event.progress is not None and not preempted:
            preempted.append(owner(results, OTHER))
            os.kill(preempted[0], signal.SIGUSR2)

    executors.train_cells("slurm", results, [OTHER], on_event, {"timeout_min": 10}, cluster="local")
    assert owner(results, OTHER) != preempted[0]
    (log,) = (results / "logs" / "slurm").glob("*_log.out")
    assert "Requeued job" in log.read_text()
    assert_same_runs(undisturbed, results, 1)
    lines = (results / "logs" / f"{OTHER.file_name}.jsonl").read_text().splitlines()
    steps = [json.loads(line)["progress"]["step"] for line in lines]
    assert steps == sorted(set(steps))  # the state was saved: nothing was trained twice


def test_a_job_first_trains_the_cells_that_guide_its_own_unless_others_have(tmp_path, monkeypatch):
    subject = Subject(model_config("1x16"), (3.0,), LearningRates(1e-2, 1_000))
    experiment = Experiment("guided", (subject,), (128, 256, 512, 1_024, 2_048), 1_000)
    write_experiment(tmp_path, experiment)
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path))  # the job sets it
    trained = []

    def train(workdir, cells, *args, **options):
        for cell in cells:
            trained.append(cell.batch_tokens)
            write_search(workdir, experiment, cell, [])

    monkeypatch.setattr(executors, "train_in_workers", train)
    cells = {cell.batch_tokens: cell for cell in experiment.cells}
    assert executors.CellJob(tmp_path, tmp_path, cells[2_048])() is None
    assert trained == [512, 1_024, 2_048]
    assert executors.CellJob(tmp_path, tmp_path, cells[256])() is None
    assert trained == [512, 1_024, 2_048, 256]
