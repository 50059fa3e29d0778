"""The examples of docs/your_model.md and of the README's section on other trainers, as they are printed."""

import ast
import dataclasses
import math
import re
import shlex

import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
import pytest

import scaling_jax as sj
from scaling_jax.scanning import Setting
from scaling_jax.scanning.by_command import check_command
from scaling_jax.scanning.records import load_experiment
from scaling_jax.training import Interrupted, read_metrics, run_folder
from tests.scanning.made_up_loss import loss_after
from tests.test_docs import DOCS, blocks

*_, SCIKIT_LEARN, TORCH = blocks(DOCS / "your_model.md", "python")
BEFORE, _, AFTER = SCIKIT_LEARN.partition("def evaluations(")
WITH_TORCH = BEFORE + TORCH + AFTER[AFTER.index("study = ") :]


@pytest.mark.slow
def test_scikit_learn_is_scanned(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    exec(SCIKIT_LEARN, {})
    fit = sj.read_results("results/digits").fit()
    assert [point.loss for point in fit.points] == list(sj.log_spaced(0.6, 0.35, 6))
    assert all(8 < point.tradeoff.b_crit < 512 for point in fit.points)
    assert "S_min is below 100 steps at 6 of 6 losses" in capsys.readouterr().out
    assert " images" in (tmp_path / "results/digits/report.html").read_text()


@pytest.mark.slow
def test_pytorch_is_scanned(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    exec(WITH_TORCH, {})
    fit = sj.read_results("results/digits").fit()
    assert [point.loss for point in fit.points] == list(sj.log_spaced(0.6, 0.35, 6))
    assert all(8 < point.tradeoff.b_crit < 512 for point in fit.points)


def test_pytorchs_trainer_takes_the_place_of_scikit_learns():
    """By its syntax and its names alone, because the tests do without PyTorch."""
    compile(WITH_TORCH, "your_model.md", "exec")
    for example in (SCIKIT_LEARN, TORCH):
        (trainer,) = (node for node in ast.parse(example).body if isinstance(node, ast.FunctionDef))
        assert (trainer.name, [argument.arg for argument in trainer.args.args]) == ("evaluations", ["setting"])
        used = {node.attr for node in ast.walk(trainer) if isinstance(node, ast.Attribute)}
        assert used & {field.name for field in dataclasses.fields(Setting)} >= {"batch", "learning_rate", "seed"}


def test_the_experiment_in_pytorch_scans_its_trainer_by_both_doors():
    """`digits_torch.py`: its experiment can be read, and its command gives what its trainer takes, in that order."""
    folder = DOCS.parent / "experiments"
    experiment = load_experiment(folder / "digits_torch.py")
    said = ast.get_docstring(ast.parse((folder / "digits_torch.py").read_text()))
    (command,) = re.findall(r"TRAIN='(.*?)'", said)
    check_command(command)
    (kinds,) = re.findall(r"for name, kind in \{(.*)\}", (folder / "digits_torch_trainer.py").read_text())
    assert re.findall(r'"(\w+)"', kinds) == re.findall(r"\{(\w+)\}", command)
    model = sj.OtherModel("mlp", 64 * 64 + 2 * 64 + 64 * 10 + 10, unit="images")
    assert [subject.model for subject in experiment.subjects] == [model]


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = next(b for b in blocks(DOCS.parent / "README.md", "python") if "Study(" in b)

    def my_training(batch, learning_rate, seed, max_steps):
        steps = sorted({max(10, round(10 * 1.07**k)) for k in range(200) if 10 * 1.07**k < min(max_steps, 5e4)})
        return steps, [loss_after(step, batch, learning_rate) * 0.45 for step in steps]

    exec(example, {"sj": sj, "my_training": my_training})
    fit = sj.read_results("results/mine").fit()
    assert all(math.isfinite(point.tradeoff.b_crit) for point in fit.points)


def test_the_commands_have_places_that_exist():
    for page in (DOCS / "your_model.md", DOCS.parent / "README.md"):
        (example,) = (block for block in blocks(page, "bash") if "--command" in block)
        words = shlex.split(example.replace("\\\n", " "))
        check_command(words[words.index("--command") + 1])


def test_the_task_of_the_page_and_that_of_the_readme_train(tmp_path):
    (example,) = (block for block in blocks(DOCS / "your_model.md", "python") if "sj.Task" in block)
    namespace: dict = {}
    exec(example, namespace)
    experiment = namespace["EXPERIMENT"]
    first = experiment.run(experiment.cells[3], 0, max_steps=60)
    (example,) = (block for block in blocks(DOCS.parent / "README.md", "python") if "sj.Task" in block)
    photographs = jnp.ones((64, 8)), jnp.zeros(64, int)
    data = dict(zip(("images", "labels", "test_images", "test_labels"), photographs * 2, strict=True))
    namespace = {"sj": sj, "optax": optax, "net": linen.Dense(2), **data}
    exec(example, namespace)
    for run in (first, dataclasses.replace(first, model=namespace["Photographs"]())):
        with jax.numpy_rank_promotion("allow"):
            result = sj.train(run, tmp_path, num_devices=1)
        assert result.test_loss < 0.7


def test_the_digits_are_learnt_with_the_statistics_of_whole_batches(tmp_path):
    pytest.importorskip("sklearn")
    experiment = load_experiment(DOCS.parent / "experiments" / "digits.py")
    cell = next(cell for cell in experiment.cells if cell.batch_tokens == 64)
    run = experiment.run(cell, 0, max_steps=60)
    with jax.numpy_rank_promotion("allow"):
        result = sj.train(run, tmp_path, num_devices=1)
    assert (run.batch_tokens, run.model.unit, result.test_loss < 1.5) == (64, "images", True)


TASKS = [block for block in blocks(DOCS / "tasks.md", "python") if "(sj.Task)" in block]


LIBRARIES = [
    pytest.param(example, id=name, marks=pytest.mark.slow if name in ("nnx", "equinox") else ())
    for example, name in zip(TASKS, ("plain", "linen", "nnx", "equinox"), strict=True)
]


@pytest.mark.parametrize("example", LIBRARIES)
def test_tasks_of_each_library_train_and_go_on_after_an_interruption(example, tmp_path):
    pytest.importorskip("sklearn")
    namespace: dict = {}
    exec(example, namespace)
    run = sj.Run(
        model=namespace["Digits"](),
        batch_tokens=32,
        learning_rate=0.2,
        max_steps=60,
        optimizer=sj.OptimizerConfig("sgd"),
        steps_per_call=16,
    )
    with jax.numpy_rank_promotion("allow"), pytest.raises(Interrupted):
        sj.train(run, tmp_path, num_devices=1, should_stop=lambda: True)
    with jax.numpy_rank_promotion("allow"):
        sj.train(run, tmp_path, num_devices=1)
    losses = [line.test_loss for line in read_metrics(run_folder(tmp_path, run)) if line.evaluated]
    assert losses[-1] < 0.8 * losses[0]
