"""Scans of tasks: in this process, by workers that run the file which defines them, and on the command line."""

import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

import scaling_jax as sj
from scaling_jax.io import UserError
from scaling_jax.scanning.records import load_experiment, read_experiment, source_of
from scaling_jax.training import read_metrics

DRAWS = np.random.default_rng(0)


class Walk(sj.Task):
    """SGD on a quadratic with noise: B_crit is known to be finite, and a step costs nothing."""

    name, unit, data_name = "walk", "steps", "draws of a normal distribution"
    train = DRAWS.normal(size=(4096, 2)).astype(np.float32)
    held_out = np.zeros((1, 2), np.float32)

    def init(self, key):
        return {"w": jnp.ones(2)}

    def loss(self, params, batch):
        return jnp.mean(jnp.sum(0.5 * params["w"][None] ** 2 + params["w"][None] * batch, axis=1))

    def metric(self, params, batch):
        return 0.5 * jnp.sum(params["w"] ** 2) + 0.01


def experiment_of(*tasks, **changes):
    settings = {
        "name": "walks",
        "subjects": tuple(sj.Subject(t, (0.3, 0.1), sj.LearningRates(0.02, 8, most=3, search="grid")) for t in tasks),
        "batch_tokens": (2, 8, 32),
        "max_tokens": 4_000,
        "optimizer": sj.OptimizerConfig("sgd"),
    }
    return sj.Experiment(**(settings | changes))


def test_a_task_is_scanned_in_this_process_and_read_without_its_code(tmp_path):
    experiment = experiment_of(Walk())
    folder = sj.scan(experiment, tmp_path)
    read = read_experiment(folder)
    assert read == experiment
    assert (read.text, read.unit) == ("draws of a normal distribution", "steps")
    results = sj.read_results(folder)
    assert {record.run.batch_tokens for record in results.runs} == {2, 8, 32}
    assert all(record.run.model == WALK for record in results.runs)
    assert list(results.runs[0].noise_by_part) == ["all"]
    assert results.fit().points[-1].loss == 0.1
    runs = len(list((folder / "runs").iterdir()))
    sj.scan(experiment, tmp_path)  # nothing to do
    assert len(list((folder / "runs").iterdir())) == runs
    with pytest.raises(UserError, match="its code isn't here"):
        sj.scan(read, tmp_path)


WALK = experiment_of(Walk()).subjects[0].model
FILE = """
    import os
    import pathlib
    import jax.numpy as jnp
    import numpy as np
    import scaling_jax as sj
    from beside import START

    with pathlib.Path(__file__).with_name("processes").open("a") as note:
        note.write(f"{os.getpid()}\\n")

    class Walk(sj.Task):
        name, unit = "walk", "steps"
        train = np.random.default_rng(0).normal(size=(4096, 2)).astype(np.float32)
        held_out = np.zeros((1, 2), np.float32)

        def init(self, key):
            return {"w": START * jnp.ones(2)}

        def loss(self, params, batch):
            return jnp.mean(jnp.sum(0.5 * params["w"] ** 2 + params["w"] * batch, axis=1))

        def metric(self, params, batch):
            return 0.5 * jnp.sum(params["w"] ** 2) + 0.01

    EXPERIMENT = sj.Experiment(
        name="walks",
        subjects=(sj.Subject(Walk(), (0.3, 0.1), sj.LearningRates(0.02, 8, most=3, search="grid")),),
        batch_tokens=(2, 8, 32),
        max_tokens=4_000,
        optimizer=sj.OptimizerConfig("sgd"),
    )
    RUN = sj.Run(model=Walk(), batch_tokens=8, learning_rate=0.1, max_steps=20, optimizer=sj.OptimizerConfig("sgd"))
"""


def command(*arguments):
    words = [sys.executable, "-m", "scaling_jax.cli.main", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text("START = 1.0\n")
    path = tmp_path / "walks.py"
    path.write_text(textwrap.dedent(FILE))
    return path


def test_a_file_tells_tasks_where_they_come_from(file):
    experiment = load_experiment(file)
    assert source_of(experiment) == (file, True)
    assert source_of(experiment_of(Walk())) == (None, False)


@pytest.mark.slow
def test_workers_run_the_file_that_defines_a_task(file, tmp_path):
    done = command("scan", file, "--results", tmp_path / "scan", "--set", "max_tokens=3900")
    assert "walk · 32 steps" in done
    assert " tokens" not in done
    assert len(set((tmp_path / "processes").read_text().split())) > 1
    assert read_experiment(tmp_path / "scan").max_tokens == 3_900


@pytest.mark.slow
def test_train_takes_a_run_of_a_task(file, tmp_path):
    done = command("train", file, "--results", tmp_path / "run", "--learning-rate", "0.2")
    assert "160 steps" in done
    assert " tokens" not in done
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    assert read_metrics(folder)[-1].step == 20


def test_tasks_on_different_data_are_refused(tmp_path):
    class Other(Walk):
        name = "other"
        train = Walk.train + 1

    with pytest.raises(UserError, match="walk and other have different data"):
        sj.scan(experiment_of(Walk(), Other()), tmp_path)


def test_other_executors_need_the_file(tmp_path):
    with pytest.raises(UserError, match="executor slurm needs the Python file that defines the tasks"):
        sj.scan(experiment_of(Walk()), tmp_path, executor="slurm")


def test_a_language_model_of_your_own_reads_text(tmp_path):
    """Bigrams: a table of logits."""

    class Bigrams:
        def init(self, key, tokens):
            return {"table": jnp.zeros((257, 257))}

        def apply(self, params, tokens):
            return params["table"][tokens]

    task = sj.LanguageModel(Bigrams(), text="python", context=16)
    run = sj.Run(model=task, batch_tokens=512, learning_rate=0.5, max_steps=30, eval_tokens=512)
    result = sj.train(run, tmp_path, num_devices=1)
    assert (run.text, run.model.name, run.model.unit) == ("python", "Bigrams", "tokens")
    assert result.test_loss < 0.8 * np.log(257)
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_metrics(folder)[-1].test_bits_per_byte == pytest.approx(result.test_loss / np.log(2), rel=0.1)
    built_in = sj.Run(
        model=sj.LanguageModel(sj.model_config("1x16"), text="files:*.txt"),
        batch_tokens=128,
        learning_rate=0.1,
        max_steps=1,
    )
    assert (built_in.model, built_in.text) == (sj.model_config("1x16"), "files:*.txt")


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
    class Small:
        def init(self, key, tokens):
            return {"table": jnp.zeros((100, 100))}

        def apply(self, params, tokens):
            return params["table"][tokens]

    run = sj.Run(
        model=sj.LanguageModel(Small(), context=16), batch_tokens=128, learning_rate=0.5, max_steps=3, eval_tokens=512
    )
    with pytest.raises(UserError, match=r"apply of Small gives logits \(1, 16, 100\).* 257 or more"):
        sj.train(run, tmp_path, num_devices=1)
