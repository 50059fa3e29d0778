"""Results that version 0.1.0 left, of schema 1, read by this version and by one that knows more fields."""

import ast
import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import scaling_jax
from scaling_jax.data import Corpus
from scaling_jax.io import UserError
from scaling_jax.results import analyse, read_results
from scaling_jax.results.status import read_status
from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, scan
from scaling_jax.scanning.cells import finished_runs
from scaling_jax.scanning.plan import plan_scan
from scaling_jax.scanning.records import SCHEMA, read_experiment, read_search, write_experiment
from scaling_jax.tasks import ModelConfig, model_config
from scaling_jax.training import OptimizerConfig, Run, read_metrics, read_result, run_folder, train
from scaling_jax.training.records import read_run_config

MODEL = model_config("1x16", context=32)
EXPERIMENT = Experiment(
    name="small",
    subjects=(Subject(MODEL, log_spaced(3.3, 2.8, 5), LearningRates(1.6e-2, 2_048, places=2, most=5, search="grid")),),
    batch_tokens=(128, 256, 512, 1024, 2048),
    max_tokens=400_000,
    seeds=(0, 1),
    warmup_steps=10,  # the default then
)
TRAINED = Run(model=MODEL, batch_tokens=256, learning_rate=4e-3, max_steps=200)
DERIVED = ("measurements.csv", "noise_scale.csv", "seeds.csv", "three_measurements.csv", "fit.json")


@pytest.fixture
def _untrained(monkeypatch):
    """Whatever would train fails."""

    def fail(*_, **__):
        raise AssertionError("something is trained")

    monkeypatch.setattr(sys.modules[scan.__module__], "train_in_workers", fail)
    monkeypatch.setattr(sys.modules[train.__module__], "Attempt", fail)


def taken_away(folder, names=DERIVED):
    """The bytes of files that are there no more."""
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    return before


def check_as_before(folder, before):
    """The same bytes. But noise scales have no lower end below 0 any more, and fit.json says more, also on branches."""
    now = {name: (folder / name).read_bytes() for name in before}
    assert now.keys() == before.keys()
    for name in now:
        if name == "noise_scale.csv":
            rows, old_rows = (list(csv.DictReader(x[name].decode().splitlines())) for x in (now, before))
            for row in old_rows:
                row["low"] = "0" if float(row["low"]) < 0 else row["low"]
            assert rows == old_rows
        elif name == "fit.json":
            old_values = json.loads(before[name])
            del old_values["noise_scale_over_b_crit"]  # now compared with the local B_crit
            del old_values["notes"]  # words of the version that fitted
            check_holds(json.loads(now[name]), old_values)
        elif name == "three_measurements.csv":
            rows, old_rows = (list(csv.DictReader(x[name].decode().splitlines())) for x in (now, before))
            known = {(row["model"], row["loss"]): row for row in rows}
            for old in old_rows:  # in new ones, each has a local B_crit too, and rows that have nothing else
                assert known[old["model"], old["loss"]].items() >= old.items()
        else:
            assert now[name] == before[name]


def check_holds(values, old_values):
    """All old values are there, at the same place; sentences are there among new ones."""
    if isinstance(old_values, dict):
        for name, old in old_values.items():
            check_holds(values[name], old)
    elif isinstance(old_values, list) and old_values and isinstance(old_values[0], dict):
        assert len(values) == len(old_values)
        for value, old in zip(values, old_values, strict=True):
            check_holds(value, old)
    elif isinstance(old_values, list) and old_values and isinstance(old_values[0], str):
        assert [value for value in values if value in old_values] == old_values
    else:
        assert values == old_values


def contents(folder, pattern="**/*"):
    return {path: path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def test_it_is_fitted_to_the_same_bytes(old):
    before, runs = taken_away(old / "small"), contents(old / "small", "runs/**/*")
    analyse(old / "small")
    check_as_before(old / "small", before)
    assert contents(old / "small", "runs/**/*") == runs


def test_all_of_it_is_done(old):
    status = read_status(old / "small")
    assert [part.name for part in status.parts] == [cell.name for cell in EXPERIMENT.cells]
    assert {part.state for part in status.parts} == {"done"}
    assert (status.name, status.running, status.fraction) == ("small", False, 1.0)
    (run,) = read_status(old / "trained").parts
    assert (run.name, run.state, run.step) == (TRAINED.label, "done", 200)


@pytest.mark.usefixtures("_untrained")
def test_the_same_scan_trains_nothing_and_writes_down_that_its_searches_have_ended(old):
    before, runs, events = taken_away(old / "small"), contents(old / "small", "runs/**/*"), []
    for _ in range(2):  # the second finds what the first wrote
        plan = plan_scan(EXPERIMENT, old / "small")
        assert (plan.cells, plan.cells_done) == ((), len(EXPERIMENT.cells))
        assert scan(EXPERIMENT, old / "small", on_event=events.append) == old / "small"
    assert events == []
    for cell in EXPERIMENT.cells:
        assert read_search(old / "small", cell).runs == finished_runs(EXPERIMENT, cell, old / "small")
    assert json.loads((old / "small" / "experiment.json").read_text())["schema"] == SCHEMA
    assert contents(old / "small", "runs/**/*") == runs
    analyse(old / "small")
    check_as_before(old / "small", before)


def test_an_old_scan_that_lacks_a_run_is_not_done(old):
    (cell,) = [cell for cell in EXPERIMENT.cells if cell[1:] == (1024, 1)]
    for run in finished_runs(EXPERIMENT, cell, old / "small"):
        result = old / "small" / "runs" / run / "result.json"
        kept = result.read_bytes()
        result.unlink()
        assert finished_runs(EXPERIMENT, cell, old / "small") is None
        result.write_bytes(kept)
    assert finished_runs(EXPERIMENT, cell, old / "small")


def test_a_larger_scan_lacks_its_new_cells_alone(old):
    larger = dataclasses.replace(EXPERIMENT, batch_tokens=(*EXPERIMENT.batch_tokens, 4096), seeds=(0, 1, 2))
    lacking = {cell for cell in larger.cells if finished_runs(larger, cell, old / "small") is None}
    assert lacking == set(larger.cells) - set(EXPERIMENT.cells)


def test_its_branches_are_measured_again_where_it_measured_nothing(old):
    """It started some branches between evaluations of the run, and wrote the run's batch size as B_crit there."""
    with (old / "small" / "branches.csv").open() as file:
        before = [{name: float(row[name]) for name in row if name != "model"} for row in csv.DictReader(file)]
    results = read_results(old / "small")
    (note,) = results.notes
    assert "branches.csv line 3 " in note
    nothing = [row["b_crit"] == row["low"] == row["high"] == row["batch_tokens"] for row in before]
    assert sum(nothing) == 2
    for found, row, new in zip(results.branches, before, nothing, strict=True):
        assert (found.seed, found.tokens, found.replicates) == (row["seed"], row["tokens"], 1)
        assert (found.low, found.high) == (256.0, math.inf)  # one replicate has no interval
        if new:
            assert 400 < found.b_crit < 600
        else:
            assert (found.b_crit, found.loss) == pytest.approx((row["b_crit"], row["loss"]))


def text(manifest):
    """Some text by the name of what runs were trained on."""
    rows = np.zeros((8, MODEL.context + 1), np.uint16)
    return Corpus(rows, rows, MODEL.vocab_size, manifest)


@pytest.mark.usefixtures("_untrained")
def test_a_trained_run_gives_its_result_and_goes_on_with_nothing(old):
    (folder,) = (old / "trained" / "runs").iterdir()
    before, config = contents(folder), read_run_config(folder)
    assert (config.run, config.schema) == (TRAINED, 1)
    assert run_folder(old / "trained", TRAINED) == folder
    result = train(TRAINED, old / "trained", corpus=text(config.corpus), num_devices=1)
    assert result == read_result(folder)
    assert (result.status, result.steps) == ("exhausted", read_metrics(folder, result)[-1].step)
    assert contents(old / "trained") == before
    with pytest.raises(UserError, match=f"{folder} .*python"):
        train(TRAINED, old / "trained", corpus=text({**config.corpus, "sha256": "another"}), num_devices=1)
    with pytest.raises(AssertionError, match="trained"):  # another run isn't this one
        train(dataclasses.replace(TRAINED, seed=1), old / "trained", corpus=text(config.corpus), num_devices=1)


LATER = """
import dataclasses, json, pathlib, sys
from scaling_jax.results import analyse, read_results
from scaling_jax.results.status import read_status
from scaling_jax.scanning import scan
from scaling_jax.scanning.records import read_experiment
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig, Run
from scaling_jax.training.records import read_run_config, run_folder

def fail(*_, **__):
    raise AssertionError("something is trained")

sys.modules["scaling_jax.scanning.scan"].train_in_workers = fail
old, new = map(pathlib.Path, sys.argv[1:])
events, states = [], []
analyse(old / "small")
for folder in (old / "small", new):
    states += [part.state for part in read_status(folder).parts]
    scan(read_experiment(folder), folder, on_event=events.append)
(trained,) = (old / "trained" / "runs").iterdir()
run = read_run_config(trained).run
print(json.dumps({
    "fields": [dataclasses.fields(kind)[-1].name for kind in (Run, OptimizerConfig, ModelConfig)],
    "states": sorted(set(states)),
    "events": len(events),
    "measured": [[str(value) for value in row] for row in read_results(new).measurements],
    "trained": run_folder(old / "trained", run).name,
    "run_id": run.run_id,
    "other": [dataclasses.replace(run, **{name: changed}).run_id for name, changed in (
        ("later", 1),
        ("optimizer", dataclasses.replace(run.optimizer, later=1)),
        ("model", dataclasses.replace(run.model, later=1)),
    )],
}))
"""


def with_a_field_more(package, kind):
    """The last field of a config class of a copied package becomes `later: int | None = None`."""
    path = package / Path(sys.modules[kind.__module__].__file__).relative_to(Path(scaling_jax.__file__).parent)
    source = path.read_text()
    (found,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
    last = [node for node in found.body if isinstance(node, ast.AnnAssign)][-1].end_lineno
    lines = source.splitlines()
    path.write_text("\n".join([*lines[:last], "    later: int | None = None", *lines[last:], ""]))


def test_a_version_whose_configs_have_a_field_more_finds_all_of_it_done(old, made_up, tmp_path):
    """What this version left, of schema 2, as well."""
    package = tmp_path / "later" / "scaling_jax"
    shutil.copytree(Path(scaling_jax.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in (Run, OptimizerConfig, ModelConfig):
        with_a_field_more(package, kind)
    new = tmp_path / "new"
    shutil.copytree(made_up[1], new)
    before = taken_away(old / "small")
    runs = contents(tmp_path, "*/runs/**/*")
    done = subprocess.run(
        [sys.executable, "-P", "-c", LATER, old, new],
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = types.SimpleNamespace(**json.loads(done.stdout.splitlines()[-1]))
    assert said.fields == ["later"] * 3
    assert said.states == ["done"]
    assert said.events == 0
    assert said.run_id == TRAINED.run_id
    assert len({said.run_id, *said.other}) == 4
    assert (old / "trained" / "runs" / said.trained / "result.json").exists()
    check_as_before(old / "small", before)
    assert said.measured == [[str(value) for value in row] for row in read_results(made_up[1]).measurements]
    assert contents(tmp_path, "*/runs/**/*") == runs


@pytest.mark.usefixtures("_untrained")
@pytest.mark.parametrize("schema", [1, 2])
def test_an_experiment_that_leaves_out_its_warm_up_means_the_default_of_its_schema(schema, old):
    """10 steps, not this version's 0: so its runs are those of the experiment, and none is trained again."""
    path = old / "small" / "experiment.json"
    if schema == 2:
        scan(EXPERIMENT, old / "small")
    written = json.loads(path.read_text())
    written.pop("sha256", None)  # earlier versions wrote none
    assert written.pop("warmup_steps") == 10
    path.write_text(json.dumps(written | ({"schema": 2} if schema == 2 else {})))
    assert read_experiment(old / "small") == EXPERIMENT
    assert {part.state for part in read_status(old / "small").parts} == {"done"}
    scan(EXPERIMENT, old / "small")
    said = json.loads(path.read_text())
    assert (said["schema"], said["warmup_steps"]) == (SCHEMA, 10)


def test_todays_experiment_without_a_warm_up_is_told_how_to_add_to_an_old_folder(old):
    today = dataclasses.replace(EXPERIMENT, warmup_steps=0)
    with pytest.raises(UserError, match=r"warmup_steps = 10, not 0.* --results.* warmup_steps = 10"):
        scan(today, old / "small")
    write_experiment(old / "new", today)
    assert read_experiment(old / "new") == today
