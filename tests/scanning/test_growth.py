"""Scans that grow: every run that fits is used as it is, and what is missing is trained; with real runs of a second."""

import dataclasses
import shutil
import sys

import pytest

from scaling_jax.io import UserError
from scaling_jax.results import analyse
from scaling_jax.results.status import read_status
from scaling_jax.scanning import Experiment, LearningRates, Subject, cells, scan
from scaling_jax.scanning.cells import find_outcome, finished_runs, train_cell
from scaling_jax.scanning.records import read_experiment, read_search
from scaling_jax.scanning.search import search
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Deadline, OptimizerConfig, Run, read_result
from scaling_jax.training.records import read_run_config
from tests.made_up_scan import evaluated_lines, write_run
from tests.training.counting import CORPUS, RUN

TARGETS, RATES = (5.3, 5.2, 5.1), LearningRates(2e-3, 256, places=1, most=2, search="grid")
EXPERIMENT = Experiment(
    name="tiny",
    subjects=(Subject(RUN.model, TARGETS, RATES),),
    batch_tokens=(64, 96, 128, 192, 256),
    max_tokens=6_000,
    eval_tokens=512,
)
LARGE = dataclasses.replace(EXPERIMENT, batch_tokens=(64, 96, 128, 160, 192, 224, 256), seeds=(0, 1))


def scanned(experiment, folder, corpus=CORPUS):
    """Scans in this process, a run after the other as workers do; the ids of the runs that were trained."""
    trained = set()

    def in_this_process(workdir, missing, *_, **__):
        for cell in missing:
            train_cell(read_experiment(workdir), cell, workdir, lambda: False, lambda p: trained.add(p.run_id))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "data_of", lambda *_: corpus)
        patch.setattr(sys.modules[scan.__module__], "train_in_workers", in_this_process)
        scan(experiment, folder)
    return trained


def test_the_order_of_cells_ends_with_the_cheapest_or_begins_in_the_middle(monkeypatch, tmp_path):
    orders = []

    def in_this_process(workdir, missing, *_, **__):
        orders.append([(cell.batch_tokens, cell.seed) for cell in missing])

    guided = dataclasses.replace(EXPERIMENT.subjects[0], learning_rates=dataclasses.replace(RATES, search="guided"))
    monkeypatch.setattr(cells, "data_of", lambda *_: CORPUS)
    monkeypatch.setattr(sys.modules[scan.__module__], "train_in_workers", in_this_process)
    for outwards in (False, True):
        scan(dataclasses.replace(EXPERIMENT, subjects=(guided,), seeds=(0, 1)), tmp_path, outwards=outwards)
    costly, middle = ([batch for batch, _ in order] for order in orders)
    assert costly == [128, 192, 256, 128, 192, 256, 96, 96, 64, 64]
    assert middle == [128, 128, 192, 192, 96, 96, 256, 256, 64, 64]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Gives the folder of an experiment that was scanned at once, in an empty folder."""
    folders = {}

    def folder_of(experiment):
        if experiment not in folders:
            folders[experiment] = tmp_path_factory.mktemp("once")
            scanned(experiment, folders[experiment])
        return folders[experiment]

    return folder_of


@pytest.fixture
def small(once, tmp_path):
    """A copy of the finished scan that is to grow."""
    return shutil.copytree(once(EXPERIMENT), tmp_path / "small")


def run_ids(folder):
    return {path.name for path in (folder / "runs").iterdir()}


def records(folder, ids):
    """By run, what training decided; not when it did so."""
    return {(run, name): (folder / "runs" / run / name).read_bytes() for run in ids for name in RECORDS}


RECORDS = ("config.json", "metrics.jsonl", "result.json")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def measured(folder):
    """The bytes of measurements.csv."""
    analyse(folder)
    return (folder / "measurements.csv").read_bytes()


def assert_as_at_once(folder, experiment, once):
    """The folder's measurements are those of the experiment in an empty one, and all of it is done."""
    assert measured(folder) == measured(once(experiment))
    for cell in experiment.cells:
        assert finished_runs(experiment, cell, folder)
        for run in finished_runs(experiment, cell, folder):
            assert (folder / "runs" / run / "result.json").exists()


def gone_before(small_ids, folder, run_id):
    """Results that were there of a run that differs from one of the folder only in where it ends."""
    curve = read_run_config(folder / "runs" / run_id).run.without_limits
    same = [name for name in small_ids if read_run_config(folder / "runs" / name).run.without_limits == curve]
    return [read_result(folder / "runs" / name) for name in same]


def test_more_batch_sizes_and_seeds_train_the_new_cells_alone(small, once):
    there, before = run_ids(small), contents(small / "runs")
    trained = scanned(LARGE, small)
    assert trained == run_ids(once(LARGE)) - there
    new = set(LARGE.cells) - set(EXPERIMENT.cells)
    assert trained == {run for cell in new for run in read_search(small, cell).runs}
    assert contents(small / "runs").items() >= before.items()
    assert_as_at_once(small, LARGE, once)
    assert records(small, run_ids(small)) == records(once(LARGE), run_ids(once(LARGE)))
    assert scanned(LARGE, small) == set()


def test_a_smaller_scan_finds_all_that_it_asks_in_a_larger_one(once, tmp_path):
    large = shutil.copytree(once(LARGE), tmp_path / "large")
    assert scanned(EXPERIMENT, large) == set()
    assert_as_at_once(large, EXPERIMENT, once)


def with_subject(**changes):
    return dataclasses.replace(EXPERIMENT, subjects=(dataclasses.replace(EXPERIMENT.subjects[0], **changes),))


def test_a_lower_target_trains_again_only_what_must_go_farther(small, once):
    lower = with_subject(target_losses=(*TARGETS, 5.0))
    there, before = run_ids(small), contents(small / "runs")
    trained = scanned(lower, small)
    assert trained
    for run in trained:
        result = read_result(small / "runs" / run)
        assert all(result.steps > earlier.steps for earlier in gone_before(there, small, run))
    # Every one that had used its tokens up stands for the run that the new search asks for.
    spent = {run for run in there if read_result(small / "runs" / run).status == "exhausted"}
    assert spent & {run for cell in EXPERIMENT.cells for run in read_search(small, cell).runs}
    assert contents(small / "runs").items() >= before.items()
    assert_as_at_once(small, lower, once)


def test_more_learning_rates_are_added_to_those_there(small, once):
    more = with_subject(learning_rates=dataclasses.replace(RATES, most=3))
    before = contents(small / "runs")
    trained = scanned(more, small)
    assert trained == run_ids(once(more)) - run_ids(once(EXPERIMENT))
    assert trained
    assert contents(small / "runs").items() >= before.items()
    assert_as_at_once(small, more, once)


def test_more_tokens_leave_runs_that_reached_their_target_as_they_are(small, once):
    longer = dataclasses.replace(EXPERIMENT, max_tokens=9_000)
    there, before = run_ids(small), contents(small / "runs")
    trained = scanned(longer, small)
    assert trained
    for run in trained:
        assert {earlier.status for earlier in gone_before(there, small, run)} <= {"exhausted", "given up"}
    reached = {run for run in there if read_result(small / "runs" / run).status == "reached"}
    assert reached & {run for cell in EXPERIMENT.cells for run in read_search(small, cell).runs}
    assert contents(small / "runs").items() >= before.items()
    assert_as_at_once(small, longer, once)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"optimizer": OptimizerConfig("sgd")}, ["optimizer", "'adam'", "'sgd'"]),
        ({"warmup_steps": 5}, ["warmup_steps", "0", "5"]),
        ({"text": "files:/other/*.txt"}, ["text", "'python'", "'files:/other/*.txt'"]),
        ({"name": "other"}, ["name", "'tiny'", "'other'"]),
        (
            {"subjects": (Subject(dataclasses.replace(RUN.model, context=32), TARGETS, RATES),)},
            ["model 1x16", "context=16", "context=32"],
        ),
    ],
)
def test_another_recipe_is_refused_by_what_differs(changes, names, small):
    before = contents(small)
    with pytest.raises(UserError) as refused:
        scanned(dataclasses.replace(LARGE, **changes), small)
    said = str(refused.value)
    assert "\n" not in said
    for name in (str(small), *names, "--results"):
        assert name in said
    assert contents(small) == before


def test_text_that_changed_is_refused_before_anything_is_trained_on_it(small):
    before = contents(small)
    changed = dataclasses.replace(CORPUS, manifest={**CORPUS.manifest, "sha256": "other"})
    with pytest.raises(UserError, match=f"{small} .*text .*another folder"):
        scanned(LARGE, small, changed)
    assert contents(small) == before
    assert scanned(EXPERIMENT, small, changed) == set()  # it is done: nobody asks for the text


def test_a_run_whose_folder_is_gone_is_trained_again(small, once):
    cell = EXPERIMENT.cells[2]
    (run, *_) = read_search(small, cell).runs
    shutil.rmtree(small / "runs" / run)
    assert finished_runs(EXPERIMENT, cell, small) is None
    assert [part.name for part in read_status(small).parts if part.state != "done"] == [cell.name]
    with pytest.raises(UserError, match=cell.name):
        analyse(small)
    assert scanned(EXPERIMENT, small) == {run}
    assert_as_at_once(small, EXPERIMENT, once)


DONE = Run(
    model=ModelConfig(1, 16, 1, context=16), batch_tokens=64, learning_rate=1e-2, target_loss=3.0, max_tokens=6_400
)


@pytest.mark.parametrize(
    ("status", "wanted", "found"),
    [
        ("reached", {"target_loss": 3.0, "max_tokens": 9_999}, True),
        ("reached", {"target_loss": 3.2, "max_tokens": 9_999}, True),
        ("reached", {"target_loss": 3.2, "max_steps": 200, "deadlines": (Deadline(4.0, 5),)}, True),
        ("reached", {"target_loss": 2.9, "max_tokens": 9_999}, False),
        ("reached", {"target_loss": None, "max_tokens": 9_999}, False),
        ("reached", {"target_loss": 2.9, "max_steps": 100}, True),  # it would end there as well
        ("exhausted", {"target_loss": 2.9, "max_tokens": 6_400}, True),
        ("exhausted", {"target_loss": 2.9, "max_tokens": 6_463}, True),  # no whole step more
        ("exhausted", {"target_loss": 3.2, "max_tokens": 6_464}, False),
        ("exhausted", {"target_loss": 3.2, "max_steps": 100}, True),
        ("exhausted", {"target_loss": 3.2, "max_steps": 101}, False),
        ("given up", {"target_loss": 3.2, "max_steps": 101}, False),
        ("given up", {"target_loss": 3.2, "max_steps": 100}, True),
        ("diverged", {"target_loss": 2.9, "max_tokens": 99_999}, True),
        ("exhausted", {"max_tokens": 6_400, "seed": 1}, False),
        ("exhausted", {"max_tokens": 6_400, "learning_rate": 1.0001e-2}, False),  # whose label is the same
        ("exhausted", {"max_tokens": 6_400, "warmup_steps": 11}, False),
    ],
)
def test_a_run_stands_for_those_that_it_took_every_step_of(status, wanted, found, tmp_path):
    """A run of 100 steps of 64 tokens that ended in some way."""
    wanted = dataclasses.replace(DONE, **{"max_tokens": None} | wanted)
    last = None if status == "diverged" else 2.95
    there = write_run(tmp_path, DONE, evaluated_lines(DONE, [(50, 3.5), (100, last)]), status)
    outcome = find_outcome(wanted, tmp_path)
    assert (outcome is not None) == found
    if found:
        assert (outcome.run, outcome.result) == (wanted, there.result)
        assert (outcome.steps, outcome.losses) == (there.steps, there.losses)


def test_a_search_to_a_lower_target_starts_from_rates_that_diverged_on_the_way_to_a_higher_one(tmp_path):
    lower, cell = with_subject(target_losses=(*TARGETS, 5.0)), EXPERIMENT.cells[0]
    first = EXPERIMENT.run(cell, 0)
    write_run(tmp_path, first, evaluated_lines(first, [(10, None)]), "diverged")

    def train(run):
        if (there := find_outcome(run, tmp_path)) is not None:
            return there
        losses = ((step, 5.5 - 0.01 * step) for step in range(1, 100))
        return write_run(tmp_path, run, evaluated_lines(run, losses), "reached")

    diverged, slower = search(lower, cell, train)
    assert (diverged.run, diverged.result.status) == (lower.run(cell, 0), "diverged")
    assert slower.run == lower.run(cell, -1)
