"""A scan made up from a known law: S = S_min(L)·(1 + B_crit(L)/B), with moments whose noise scale is B_crit."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.scanning import Cell, Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.scanning.records import write_experiment, write_search
from scaling_jax.scanning.search import search_all
from scaling_jax.scanning.tried import Outcome
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Run, RunResult
from scaling_jax.training.metrics import MetricsLine, course
from scaling_jax.training.records import Status, write_metrics, write_result, write_run_config

B_STAR, EXPONENT = 1e5, -5.0
# Of the whole model's |G|² and tr(Σ); parts: embedding, the layer, unembedding
PART_GRAD_SHARES, PART_NOISE_SHARES = np.array([0.2, 0.5, 0.3]), np.array([0.5, 0.3, 0.2])
CORPUS = {"source": "made up"}


def b_crit(loss):
    return B_STAR * loss**EXPONENT


def s_min(loss):
    return 20 * (3.5 / loss) ** 6


def evaluated_lines(run: Run, evaluations: Iterable[tuple[int, float | None]], **values) -> list[MetricsLine]:
    """Lines that each end with an evaluation: (step, test loss, None where it wasn't finite).

    Args:
      values: of every line, such as small_batch_tokens.
    """
    lines, last = [], 0
    for step, loss in evaluations:
        ones = [1.0] * (step - last)
        norms = {"train_loss": ones, "small_sq_norm": ones, "big_sq_norm": ones}
        counts = {"step": step, "tokens": step * run.batch_tokens, "batch_tokens": run.batch_tokens}
        line = {**counts, "small_batch_tokens": run.model.context, **norms, "test_loss": loss, **values}
        lines.append(MetricsLine.read(line))
        last = step
    return lines


def write_run(workdir: Path, run: Run, lines: Sequence[MetricsLine], status: Status) -> Outcome:
    """A finished run's folder, as training writes it."""
    folder = workdir / "runs" / run.run_id
    write_run_config(folder, run, CORPUS)
    write_metrics(folder, lines)
    last = lines[-1]
    loss = None if math.isnan(last.test_loss) else last.test_loss
    result = RunResult(run.run_id, status, last.step, last.tokens, loss, "")
    write_result(folder, result)
    found = course(lines)
    return Outcome(run, result, found.eval_steps.tolist(), found.eval_losses.tolist())


def write_scan(workdir: Path, experiment: Experiment, train) -> None:
    """A finished scan's folder; `train` is that of `search`."""
    write_experiment(workdir, experiment)
    for cell, tried in search_all(experiment, train).items():
        write_search(workdir, experiment, cell, [t.result.run_id for t in tried])


def _experiment():
    subjects = tuple(
        Subject(ModelConfig(1, width, 1), log_spaced(3.0, 2.0, 8), LearningRates(1e-2, 1_000, search="grid"))
        for width in (16, 32)
    )
    return Experiment(name="made-up", subjects=subjects, batch_tokens=powers_of_two(128, 8_192), max_tokens=100_000_000)


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """(experiment, folder) of a finished scan."""
    experiment, workdir = _experiment(), tmp_path_factory.mktemp("scan")
    losses = np.geomspace(4, 1.9, 400)
    draws = np.random.default_rng(0)

    def train(run):
        rate = experiment.run(Cell(run.model.name, run.batch_tokens, run.seed), 0).learning_rate
        slower = 1.3 ** abs(math.log2(run.learning_rate / rate))
        steps = s_min(losses) * (1 + b_crit(losses) / run.batch_tokens) * slower
        lines, last = [], 0
        for loss, step in zip(losses.tolist(), steps.astype(int).tolist(), strict=True):
            if step <= last:
                continue
            trace_cov = b_crit(loss) / run.model.context
            moments = 1 + trace_cov / np.array([[1.0], [run.batch_sequences]])
            noisy = moments * draws.normal(1, 1e-3, (2, step - last))
            shares = PART_GRAD_SHARES + PART_NOISE_SHARES * (moments - 1)
            by_layer = shares * (noisy.mean(1, keepdims=True) / moments)
            line = {"step": step, "tokens": step * run.batch_tokens, "test_loss": loss}
            line |= {"batch_tokens": run.batch_tokens, "small_batch_tokens": run.model.context}
            line |= {"train_loss": [loss] * (step - last)}
            line |= {"small_sq_norm": noisy[0].tolist(), "big_sq_norm": noisy[1].tolist()}
            line |= {"small_sq_norm_by_layer": by_layer[0].tolist(), "big_sq_norm_by_layer": by_layer[1].tolist()}
            lines.append(MetricsLine.read(line))
            last = step
        return write_run(workdir, run, lines, "reached")

    write_scan(workdir, experiment, train)
    return experiment, workdir
