"""Several processes scan together, over gloo, as one process does."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from scaling_jax.io.locks import locked
from scaling_jax.io.stores import working_copy
from scaling_jax.scanning.cells import find_outcome, finished_runs, train_cell
from scaling_jax.scanning.records import load_experiment
from scaling_jax.scanning.tried import look_at
from scaling_jax.training import read_metrics
from scaling_jax.training.records import read_run_config
from tests.training.test_processes import SECONDS, free_port

EXPERIMENT = """
from scaling_jax import Experiment, LearningRates, Subject
from scaling_jax.tasks import ModelConfig

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
EXPERIMENT = Experiment(
    name="tiny",
    subjects=(Subject(MODEL, (3.2, 2.9), LearningRates(2e-2, 256, factor=3.0, most=2)),),
    batch_tokens=(128, 192, 256),
    max_tokens=MAX_TOKENS,
    text="files:FOLDER/*.txt",
    eval_tokens=512,
)
"""
COMMAND = """
import scaling_jax.cli.main
import scaling_jax.cli.running
scaling_jax.cli.running.show = lambda results: print("analysed", results)
scaling_jax.cli.main.main()
"""
REFUSED = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, an experiment on it, and the cache of packed text."""
    folder = tmp_path_factory.mktemp("processes")
    for k in range(40):
        (folder / f"{k}.txt").write_text("".join(chr(97 + (k * j * j) % 23) for j in range(4_000)))
    text = EXPERIMENT.replace("FOLDER", str(folder)).replace("MAX_TOKENS", "2_560")
    (folder / "tiny.py").write_text(text)
    (folder / "other.py").write_text(text.replace("eval_tokens=512", "eval_tokens=1024"))
    os.environ["SCALING_JAX_CACHE"] = str(folder / "cache")
    return folder


class Scan:
    """Two processes of a device each, which scan `tiny.py` (or another file each) into a folder."""

    def __init__(self, folder, results, files=("tiny.py", "tiny.py")):
        address = f"localhost:{free_port()}"
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        command = [sys.executable, "-c", COMMAND, "scan", "--results", results]
        joining = ["--coordinator", address, "--num-processes", "2", "--process-id"]
        self.each = [
            subprocess.Popen(
                [*command, folder / file, *joining, str(i)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i, file in enumerate(files)
        ]

    def ended(self):
        """[(exit code, output)]."""
        try:
            outputs = [process.communicate(timeout=SECONDS)[0] for process in self.each]
        finally:
            for process in self.each:
                process.kill()
        return [(process.returncode, output) for process, output in zip(self.each, outputs, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Results of one process with two devices."""
    experiment = load_experiment(folder / "tiny.py")
    for cell in experiment.cells:
        train_cell(experiment, cell, folder / "one", lambda: False, lambda _: None, num_devices=2)
    return folder / "one"


def assert_same_scan(folder, results, undisturbed):
    experiment = load_experiment(folder / "tiny.py")
    for cell in experiment.cells:
        runs = finished_runs(experiment, cell, results)
        assert runs == finished_runs(experiment, cell, undisturbed)
        for run_id in runs:
            folders = [where / "runs" / run_id for where in (results, undisturbed)]
            run, other = (read_run_config(folder).run for folder in folders)
            assert run == other
            found = [find_outcome(run, where) for where in (results, undisturbed)]
            steps = [look_at(experiment.subject(cell.model).target_losses, each).steps_to_target for each in found]
            np.testing.assert_allclose(*steps, rtol=1e-4)
            for name in ("train_loss", "small_sq_norm", "big_sq_norm"):
                series = [np.concatenate([getattr(line, name) for line in read_metrics(f)]) for f in folders]
                np.testing.assert_allclose(*series, rtol=1e-5, err_msg=name)


@pytest.mark.long
def test_two_processes_scan_as_one_process_with_all_their_devices(folder, undisturbed, tmp_path):
    """One of them is asked to stop on the way; both end with what they have saved, and go on from there."""
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)  # but for one cell, to save time
    for run in results.glob("runs/1x16-b128-*"):
        shutil.rmtree(run)
    (results / "cells" / "1x16-b128-s0.json").unlink()
    interrupted = Scan(folder, results)
    while not list(results.glob("runs/1x16-b128-*/metrics.jsonl")) and interrupted.each[1].poll() is None:
        time.sleep(0.05)
    interrupted.each[1].send_signal(signal.SIGTERM)
    (code, output), (other_code, _) = interrupted.ended()
    assert (code, other_code) == (0, 0), output
    assert "saved; run the same command again" in output

    (code, output), (other_code, other_output) = Scan(folder, results).ended()
    assert (code, other_code) == (0, 0), output + other_output
    assert f"analysed {results}" in output
    assert "analysed" not in other_output
    assert_same_scan(folder, results, undisturbed)


@pytest.mark.long
def test_a_scan_into_a_bucket_is_complete_there(folder, bucket, monkeypatch, tmp_path):
    """Workers train it on one machine; another finds nothing left to train."""
    command = [sys.executable, "-c", COMMAND, "scan", folder / "tiny.py", "--results", f"{bucket}/tiny"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "another machine"))
    copy = working_copy(f"{bucket}/tiny")
    experiment = load_experiment(copy / "experiment.json")
    assert experiment == load_experiment(folder / "tiny.py")
    assert all(finished_runs(experiment, cell, copy) for cell in experiment.cells)


@pytest.mark.long
def test_what_the_first_process_refuses_ends_both_in_its_words(folder, tmp_path):
    with locked(tmp_path / ".lock", "it"):
        for code, output in Scan(folder, tmp_path).ended():
            assert code == REFUSED
            assert f"{tmp_path} is in use by process {os.getpid()}" in output
    for code, output in Scan(folder, tmp_path, files=("tiny.py", "other.py")).ended():
        assert code == REFUSED
        assert "the processes of this scan differ" in output
    assert not (tmp_path / "experiment.json").exists()
