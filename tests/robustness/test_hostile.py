"""Results folders in which one value of one file can't be: every reading command ends well or with one line."""

import io
import random
import shutil

import pytest

from scaling_jax.advice.advise import advise
from scaling_jax.console.advice import advice_table
from scaling_jax.console.commands import _branch_plans
from scaling_jax.console.tables import status_table, summary
from scaling_jax.console.terminal import Terminal
from scaling_jax.io import UserError
from scaling_jax.io.files import as_json, write_rows
from scaling_jax.results import analyse, read_results
from scaling_jax.results.measurements import Measurement, columns, measurement_notes, noise_notes, seed_notes
from scaling_jax.results.runs import last_noise_scale
from scaling_jax.results.status import read_status
from scaling_jax.scanning.cells import find_outcome, finished_runs, searched
from scaling_jax.scanning.records import check_same_recipe, load_experiment, load_run, read_experiment
from scaling_jax.training.records import read_metrics, read_run_config, run_folder
from tests.robustness.conftest import replaced
from tests.robustness.hostile import hostile_files, small_scan

SAMPLE, CORPUS = 24, 600  # files; by default, and in the long test


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(experiment, folder) of a small finished scan."""
    folder = tmp_path_factory.mktemp("small") / "scan"
    experiment = small_scan(folder)
    write_rows(folder / "measurements.csv", Measurement, read_results(folder).measurements)
    return experiment, folder


def shown(what):
    Terminal(file=io.StringIO()).print(what)


def status(_, folder):
    found = read_status(folder)
    shown(status_table(found))
    as_json(found)


def report(_, folder):
    """What fits, tables and charts are made of."""
    results = read_results(folder)
    for record in results.runs:
        assert record.noise is not None
        assert record.noise_by_part is not None
        last_noise_scale(record.course)
    assert results.curves
    if results.experiment is not None:
        assert len(columns(results.measurements)["steps"]) <= len(results.measurements)
        measurement_notes(results.measurements)
        seed_notes(results.seeds)
        noise_notes(results.cells)
        assert results.noise_scale is not None


def branch(_, folder):
    _branch_plans(read_results(folder), ["1x16"], 128, most_points=4, replicates=2, betas="run")


def resume(experiment, folder):
    """What scan and train read before they train."""
    check_same_recipe(folder, experiment)
    finished_runs(experiment, experiment.cells[0], folder)
    searched(experiment, experiment.cells[0], folder)
    run = experiment.run(experiment.cells[0], 0)
    find_outcome(run, folder)
    read_metrics(run_folder(folder, run))


def files(_, folder):
    load_experiment(folder / "experiment.json")
    for run in (folder / "runs").iterdir():
        load_run(run / "config.json")


def fit(_, folder):
    shown(summary(analyse(folder)))


def advice(_, folder):
    shown(advice_table(advise(folder, 2.5)))


READERS = (status, report, branch, resume, files)


def check(small, hostile, readers):
    """Every reader takes the file, or names it in one line."""
    experiment, folder = small
    with replaced(folder / hostile.name, hostile.content):
        for read in readers:
            if read is advice and hostile.name != "measurements.csv":
                continue
            try:
                read(experiment, folder)
            except UserError as refused:
                said = str(refused)
                assert "\n" not in said
                assert len(said) < 700, said
                # A table that can be may hold no answer; then advice names the model and the loss.
                assert str(folder) in said or (read is advice and "model 1x16" in said), (hostile.where, said)
            except Exception as error:  # any other would be a traceback
                raise AssertionError(f"{read.__name__} with {hostile.name}, {hostile.where}") from error


def sample(folder, count, seed=0):
    return random.Random(seed).sample(list(hostile_files(folder)), count)


def test_a_sample_of_hostile_files_ends_no_reader_in_a_traceback(small):
    for hostile in sample(small[1], SAMPLE):
        check(small, hostile, READERS)


@pytest.mark.long
def test_no_hostile_file_ends_a_reader_in_a_traceback(small):
    for k, hostile in enumerate(sample(small[1], CORPUS, seed=1)):
        check(small, hostile, (*READERS, advice, *([fit] if k % 5 == 0 else [])))
        shutil.rmtree(small[1] / "figures", ignore_errors=True)


@pytest.mark.parametrize(
    ("name", "where", "names"),
    [
        ("experiment.json", "subjects.0.model.n_layer = 1" + "0" * 19, "subjects[0].model.n_layer"),
        ("experiment.json", "subjects.0.learning_rates.reference_batch_tokens = 1" + "0" * 19, "reference_batch"),
        ("experiment.json", "subjects.0.learning_rates.most = 9223372036854775808", "most"),
        ("experiment.json", "batch_tokens.4 = 0", "batch_tokens"),
        ("cells/1x16-b128-s0.json", "model = 'x'", "1x16-b128-s0.json is damaged"),
        ("cells/1x16-b128-s0.json", "runs.0 = '../..'", "'../..', which isn't the name of a run's folder"),
    ],
)  # fmt: skip
def test_what_once_was_a_traceback_names_file_and_field(name, where, names, small):
    experiment, folder = small
    (hostile,) = [one for one in hostile_files(folder) if (one.name, one.where) == (name, where)][:1]
    for read in READERS[:3]:
        with replaced(folder / name, hostile.content), pytest.raises(UserError) as refused:
            read(experiment, folder)
        assert names in str(refused.value)
        assert str(folder / name) in str(refused.value)


@pytest.mark.parametrize("column", ["loss", "b_crit", "batch_tokens"])
def test_branches_that_are_not_positive_are_left_out(column, small):
    _, folder = small
    for hostile in hostile_files(folder):
        if hostile.name == "branches.csv" and hostile.where == f"line 2 column {column} = '-1'":
            with replaced(folder / hostile.name, hostile.content):
                found = read_results(folder)
            assert found.branches == ()
            assert f"branches.csv line 2 isn't a branch measurement ({column} = -1" in found.notes[0]
            return
    raise AssertionError("no such file")


def test_a_value_of_many_digits_is_cut_in_the_message(small):
    _, folder = small
    content = b'{"schema": 3, "name": ' + b"[" * 300 + b"]" * 300 + b"}"
    with replaced(folder / "experiment.json", content), pytest.raises(UserError) as refused:
        read_experiment(folder)
    assert len(str(refused.value)) < 500


def test_runs_of_the_corpus_are_really_read(small):
    """The corpus would prove nothing about files that no reader opens."""
    experiment, folder = small
    for name in {hostile.name for hostile in hostile_files(folder)} - {"measurements.csv"}:
        if not name.endswith(("clock.jsonl", "branches.csv")):
            with replaced(folder / name, b"[]\n"), pytest.raises(UserError, match=name.rpartition("/")[2]):
                report(experiment, folder)
    assert read_run_config(sorted((folder / "runs").iterdir())[0])
