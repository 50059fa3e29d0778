"""A scan made up from a known law: S = S_min(L)·(1 + B_crit(L)/B), with moments whose noise scale is B_crit."""

import math

import numpy as np
import pytest

from scaling_jax.io.config import to_dict
from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.scanning.search import search
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import RunResult
from scaling_jax.training.records import append_metrics, write_json, write_result

B_STAR, EXPONENT = 1e5, -5.0
# Of the whole model's |G|² and tr(Σ); parts: embedding, the layer, unembedding
PART_GRAD_SHARES, PART_NOISE_SHARES = np.array([0.2, 0.5, 0.3]), np.array([0.5, 0.3, 0.2])


def b_crit(loss):
    return B_STAR * loss**EXPONENT


def s_min(loss):
    return 20 * (3.5 / loss) ** 6


def _experiment():
    subjects = tuple(
        Subject(ModelConfig(1, width, 1), log_spaced(3.0, 2.0, 8), LearningRates(1e-2, 1_000)) for width in (16, 32)
    )
    return Experiment("made-up", subjects, powers_of_two(128, 8_192), max_tokens=100_000_000)


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """(experiment, folder) of a finished scan."""
    experiment, workdir = _experiment(), tmp_path_factory.mktemp("scan")
    write_json(workdir / "experiment.json", to_dict(experiment))
    losses = np.geomspace(4, 1.9, 400)
    draws = np.random.default_rng(0)

    def train(run):
        folder = workdir / "runs" / run.run_id
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {"run": to_dict(run), "corpus": {"source": "made up"}})
        rate = experiment.groups[0].subject.learning_rates.rate(run.batch_tokens, 0)
        slower = 1.3 ** abs(math.log2(run.learning_rate / rate))
        steps = s_min(losses) * (1 + b_crit(losses) / run.batch_tokens) * slower
        last = 0
        for loss, step in zip(losses, steps.astype(int), strict=True):
            if step <= last:
                continue
            trace_cov = b_crit(loss) / run.model.context
            moments = 1 + trace_cov / np.array([[1.0], [run.batch_sequences]])
            noisy = moments * draws.normal(1, 1e-3, (2, step - last))
            line = {"step": int(step), "test_loss": float(loss), "small_batch_tokens": run.model.context}
            line |= {"small_sq_norm": noisy[0].tolist(), "big_sq_norm": noisy[1].tolist()}
            shares = PART_GRAD_SHARES + PART_NOISE_SHARES * (moments - 1)
            by_layer = shares * (noisy.mean(1, keepdims=True) / moments)
            line |= {"small_sq_norm_by_layer": by_layer[0].tolist(), "big_sq_norm_by_layer": by_layer[1].tolist()}
            append_metrics(folder, line)
            last = int(step)
        result = RunResult(run.run_id, "reached", last, last * run.batch_tokens, float(losses[-1]), "")
        write_result(folder, result)
        return result

    for group in experiment.groups:
        search(experiment, group, workdir, train)
    return experiment, workdir
