"""Runs as their folders hold them: each file is opened once, each step enters with its own line's batch sizes."""

import collections
import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.report import write_figures, write_report
from scaling_jax.results import analyse, read_results
from scaling_jax.results.runs import (
    last_noise_scale,
    moments_by_part,
    moments_by_step,
    noise_windows,
    part_windows,
)
from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.scanning.cells import finished_runs
from scaling_jax.scanning.records import read_experiment, write_experiment, write_search
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Run, read_metrics
from scaling_jax.training.metrics import MetricsLine, course
from tests.made_up_scan import write_run, write_scan

MODEL = ModelConfig(1, 16, 1, context=16)
# Of the parts of a model: their sums are the whole model's. Noise scales in tokens: 500, 400, 100; of all 300.
GRAD_SQ_NORM, TRACE_COV = np.array([0.2, 0.4, 0.4]), np.array([100.0, 160.0, 40.0])
B_SIMPLE = TRACE_COV.sum() / GRAD_SQ_NORM.sum()


def devices_change(run: Run, small_batches, steps_of_line=5, lines_each=12) -> list[MetricsLine]:
    """Expected moments, exactly, of a run that goes on at one small batch after the other, as its devices make them.

    The test loss falls as step^−0.1.
    """
    lines = []
    for small in np.repeat(small_batches, lines_each):
        step = (len(lines) + 1) * steps_of_line
        norms = {name: GRAD_SQ_NORM + TRACE_COV / size for name, size in (("small", small), ("big", run.batch_tokens))}
        values = {"step": step, "tokens": step * run.batch_tokens, "test_loss": 4 * step**-0.1}
        values |= {"batch_tokens": run.batch_tokens, "small_batch_tokens": int(small)}
        values |= {"train_loss": [3.0] * steps_of_line}
        values |= {f"{name}_sq_norm": [float(norms[name].sum())] * steps_of_line for name in norms}
        values |= {f"{name}_sq_norm_by_layer": norms[name].tolist() for name in norms}
        lines.append(MetricsLine.read(values))
    return lines


@pytest.fixture
def moved(tmp_path):
    """The course, as it is read from disk, of a run that was moved from two devices to eight and then to one."""
    run = Run(model=MODEL, batch_tokens=256, learning_rate=1e-2, max_steps=180)
    write_run(tmp_path, run, devices_change(run, [64, 16, 128]), "exhausted")
    return course(read_metrics(tmp_path / "runs" / run.run_id))


def test_moments_are_those_of_each_lines_own_small_batch(moved):
    grad_sq_norm, trace_cov = moments_by_step(moved)
    np.testing.assert_allclose(grad_sq_norm, np.full(180, GRAD_SQ_NORM.sum()), rtol=1e-9)
    np.testing.assert_allclose(trace_cov, np.full(180, TRACE_COV.sum()), rtol=1e-9)
    parts = moments_by_part(moved)
    assert parts.num_steps.tolist() == [5] * 36
    np.testing.assert_allclose(parts.grad_sq_norm, np.tile(GRAD_SQ_NORM, (36, 1)), rtol=1e-9)
    np.testing.assert_allclose(parts.trace_cov, np.tile(TRACE_COV, (36, 1)), rtol=1e-9)


def test_noise_scales_over_a_run_and_at_its_end_do_not_see_its_devices(moved):
    windows, parts = noise_windows(moved), part_windows(moved)
    assert len(windows) > 10
    assert [window.noise.value for window in windows] == pytest.approx([B_SIMPLE] * len(windows))
    assert last_noise_scale(moved, share=0.6).value == pytest.approx(B_SIMPLE)
    assert len(parts) == 3
    for expected, found in zip(TRACE_COV / GRAD_SQ_NORM, parts.values(), strict=True):
        assert len(found) > 2
        assert [window.value for window in found] == pytest.approx([expected] * len(found))


def test_a_scan_that_went_on_with_other_devices_measures_the_same_noise_scale(tmp_path):
    """Its first half has two microbatches of a device, its second eight devices' shares."""
    experiment = Experiment(
        name="moved",
        subjects=(Subject(MODEL, (3.2, 3.0, 2.8, 2.6, 2.5), LearningRates(1e-2, 1_000, most=1)),),
        batch_tokens=(128, 256, 512),
        max_tokens=1_000_000,
    )

    def train(run):
        return write_run(tmp_path, run, devices_change(run, [run.batch_tokens // 2, 16]), "exhausted")

    write_scan(tmp_path, experiment, train)
    noise = read_results(tmp_path).noise_scale
    assert len(noise) == 3 * 4
    for measured in noise:
        assert measured.resolved
        assert measured.b_simple == pytest.approx(B_SIMPLE)


_opened: list[Path] | None = None


def _note(event: str, arguments: tuple) -> None:
    # `os.open` inside of `open` tells it again, without a mode.
    named = event == "open" and arguments[1] is not None and isinstance(arguments[0], str | Path)
    if named and _opened is not None:
        _opened.append(Path(arguments[0]))


sys.addaudithook(_note)  # for good; it listens only where it is asked to


@contextlib.contextmanager
def opened():
    """The files that are opened meanwhile, each as often as it is."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def test_no_file_of_a_run_is_read_twice_for_a_fit_its_figures_and_its_report(old):
    """Neither in a scan of schema 1, whose searches are replayed over their runs, nor in one that left records."""
    folder = old / "small"
    with opened() as files:
        analyse(folder)
    assert_once(files, folder)
    experiment = read_experiment(folder)
    for cell in experiment.cells:
        write_search(folder, experiment, cell, finished_runs(experiment, cell, folder))
    write_experiment(folder, experiment)
    with opened() as files:
        analysis = analyse(folder)
        write_figures(analysis)
        write_report(analysis)
    assert_once(files, folder)


def assert_once(files, folder):
    counts = collections.Counter(path for path in files if folder / "runs" in path.parents)
    assert set(counts) == {path for path in folder.glob("runs/*/*") if path.name != "clock.jsonl"}
    assert set(counts.values()) == {1}
