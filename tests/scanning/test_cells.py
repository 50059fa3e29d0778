"""Many runs at once find what one after the other find."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest

from scaling_jax.scanning import Event, Experiment, LearningRates, Subject, cells, scan
from scaling_jax.scanning.cells import find_outcome, finished_runs, train_cell
from scaling_jax.scanning.scan import _devices_for
from scaling_jax.scanning.tried import look_at
from scaling_jax.training import records
from scaling_jax.training.metrics import MetricsLine
from scaling_jax.training.records import read_run_config
from tests.made_up_scan import write_run
from tests.training.counting import CORPUS, RUN

EXPERIMENT = Experiment(
    name="tiny",
    subjects=(Subject(RUN.model, (5.45, 5.3), LearningRates(1e-2, 256, factor=3.0, most=3, together=2)),),
    batch_tokens=(64, 128, 256),
    max_tokens=2_000,
    seeds=(0, 1),
    eval_tokens=512,
)


@pytest.mark.long
def test_a_scan_on_accelerators_trains_cells_that_differ_in_seed_together_as_each_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "data_of", lambda *_: CORPUS)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    events = []
    scan(EXPERIMENT, tmp_path / "together", on_event=events.append)
    assert {e.cell for e in events if e == Event(e.cell)} == set(EXPERIMENT.cells)
    assert {e.cell for e in events if e.progress is not None} == set(EXPERIMENT.cells)
    for cell in EXPERIMENT.cells[:2]:
        train_cell(EXPERIMENT, cell, tmp_path / "alone", lambda: False, lambda _: None)
        together, alone = (outcomes(cell, tmp_path / where) for where in ("together", "alone"))
        assert together.keys() == alone.keys()
        for run, found in together.items():
            np.testing.assert_allclose(found.steps_to_target, alone[run].steps_to_target, rtol=1e-4)


def outcomes(cell, workdir):
    """By run, what came of those of a cell whose search has ended."""
    runs = [read_run_config(workdir / "runs" / run).run for run in finished_runs(EXPERIMENT, cell, workdir)]
    return {run: look_at(EXPERIMENT.subjects[0].target_losses, find_outcome(run, workdir)) for run in runs}


@pytest.mark.parametrize(("batch_tokens", "devices"), [(128, 8), (64, 4), (192, 4), (48, 1)])
def test_as_many_devices_as_share_a_batch_evenly_take_it(monkeypatch, batch_tokens, devices):
    """Sequences of 16: 8, 4, 12 and 3 of them."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert _devices_for(dataclasses.replace(RUN, batch_tokens=batch_tokens)) == devices


def test_a_finished_run_is_found_without_all_its_lines_in_memory(tmp_path, monkeypatch):
    norms = {"train_loss": [3.0, 2.0], "small_sq_norm": [2.0, 3.0], "big_sq_norm": [1.0, 2.0]}
    steps = range(2, 20_002, 2)
    sizes = {"batch_tokens": 128, "small_batch_tokens": 64, "test_loss": 3.0, **norms}
    lines = [MetricsLine.read({**sizes, "step": step, "tokens": 128 * step}) for step in steps]
    write_run(tmp_path, RUN, lines, "exhausted")
    monkeypatch.setattr(records, "_PIECE", 500)
    tracemalloc.start()
    found = find_outcome(RUN, tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.steps == list(steps)
    assert most < 4 * 2**20  # with all lines in memory 8 MB
