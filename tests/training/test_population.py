import dataclasses
from collections import deque

import jax
import numpy as np
import pytest

from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Interrupted, OptimizerConfig, Run, population, read_metrics, run_folder, train
from scaling_jax.training.population import Slots, train_many

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
RUN = Run(MODEL, batch_tokens=64, learning_rate=1e-2, target_loss=5.2, max_steps=40, eval_tokens=512, steps_per_call=8)
RUNS = [
    dataclasses.replace(RUN, learning_rate=rate, seed=seed)
    for rate, seed in ((1e-2, 0), (3e-3, 0), (2e-2, 1), (2e-2, 0))
]


def train_all(runs, workdir, corpus, num_slots=2, **options):
    waiting, results = deque(runs), {}
    train_many(
        lambda: waiting.popleft() if waiting else None,
        lambda run, result: results.__setitem__(run, result),
        workdir,
        corpus,
        num_slots=num_slots,
        **options,
    )
    return results


def metrics(workdir, run):
    return (run_folder(workdir, run) / "metrics.jsonl").read_text()


def test_many_runs_in_few_slots_train_like_each_alone(tmp_path, corpus):
    results = train_all(RUNS, tmp_path / "many", corpus)
    for run in RUNS:
        alone = train(run, tmp_path / "alone", corpus=corpus, num_devices=1)
        assert (results[run].status, results[run].steps) == (alone.status, alone.steps)
        for line, other in zip(*(read_metrics(run_folder(tmp_path / w, run)) for w in ("many", "alone")), strict=True):
            assert line.json().keys() == other.json().keys()
            np.testing.assert_allclose(line.train_loss, other.train_loss, rtol=1e-5)
            np.testing.assert_allclose(line.small_sq_norm, other.small_sq_norm, rtol=1e-3)
            np.testing.assert_allclose(line.small_sq_norm_by_part, other.small_sq_norm_by_part, rtol=1e-3)
            if line.evaluated:
                assert line.test_loss == pytest.approx(other.test_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("num_devices", "num_slots", "shape"),
    [
        (8, 3, (4, 2)),
        pytest.param(8, 2, (2, 4), marks=pytest.mark.long),
        pytest.param(6, 4, (6, 1), marks=pytest.mark.long),
    ],
)
def test_devices_that_runs_leave_over_share_their_batches(num_devices, num_slots, shape, monkeypatch, tmp_path, corpus):
    """Groups of devices × devices in each; a batch has four sequences."""
    seen = []
    monkeypatch.setattr(population, "Slots", lambda *args: seen.append(args) or Slots(*args))
    run = dataclasses.replace(RUN, max_steps=16, target_loss=None)
    train_all([run, dataclasses.replace(run, seed=1)], tmp_path, corpus, num_slots, num_devices=num_devices)
    ((program, num_groups, _),) = seen
    assert (num_groups, program.num_devices) == shape
    train(run, tmp_path / "alone", corpus=corpus, num_devices=shape[1])
    for line, other in zip(*(read_metrics(run_folder(w, run)) for w in (tmp_path, tmp_path / "alone")), strict=True):
        assert line.small_batch_tokens == other.small_batch_tokens
        for name in ("train_loss", "small_sq_norm", "big_sq_norm", "big_sq_norm_by_part"):
            np.testing.assert_allclose(getattr(line, name), getattr(other, name), rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_neighbours_change_no_bit_of_a_run(tmp_path, corpus):
    train_all(RUNS, tmp_path / "one", corpus, num_slots=4, num_devices=2)
    train_all(RUNS[::-1], tmp_path / "two", corpus, num_slots=4, num_devices=2)
    for run in RUNS:
        assert metrics(tmp_path / "one", run) == metrics(tmp_path / "two", run)


def test_an_interrupted_population_ends_as_an_undisturbed_one_bit_for_bit(tmp_path, corpus):
    train_all(RUNS, tmp_path / "whole", corpus)
    for interruption in range(100):
        answers = iter([False] * (2 * interruption + 1) + [True])
        try:
            train_all(RUNS, tmp_path / "parts", corpus, should_stop=lambda a=answers: next(a, False))
            break
        except Interrupted:
            pass
    assert interruption > 2
    for run in RUNS:
        assert metrics(tmp_path / "whole", run) == metrics(tmp_path / "parts", run)


@pytest.mark.long
def test_a_run_that_diverges_takes_nobody_with_it(tmp_path, corpus):
    sgd = [dataclasses.replace(run, optimizer=OptimizerConfig("sgd")) for run in RUNS[:2]]
    wild = dataclasses.replace(sgd[0], learning_rate=1e30)
    with jax.debug_nans(False):
        results = train_all([wild, *sgd], tmp_path / "wild", corpus)
    assert results[wild].status == "diverged"
    train_all(sgd, tmp_path / "tame", corpus)
    for run in sgd:
        assert metrics(tmp_path / "wild", run) == metrics(tmp_path / "tame", run)


def test_runs_of_another_shape_are_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="share the population's program"):
        train_all([RUN, dataclasses.replace(RUN, batch_tokens=128)], tmp_path, corpus)
