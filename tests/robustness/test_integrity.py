"""Damaged records and checkpoints: never other numbers without a word, and never a traceback.

The default tests draw a few damages of each sort; `-m long` draws 250 and 75.
"""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.results import read_results
from scaling_jax.training import Interrupted, train
from scaling_jax.training.checkpoints import _ignore_late_failures
from scaling_jax.training.records import read_metrics, read_result, whole_result
from tests.robustness.conftest import replaced
from tests.robustness.damage import KINDS, attempted, copies, draw
from tests.training.counting import CORPUS, RUN

FILES_OF_RECORDS = ("config.json", "metrics.jsonl", "result.json")


def trained(folder, **options):
    return train(RUN, folder, corpus=CORPUS, num_devices=1, **options)


def run_in(folder):
    return folder / "runs" / RUN.run_id


def records(folder):
    return {name: (run_in(folder) / name).read_bytes() for name in FILES_OF_RECORDS}


def stopped(folder, calls, **options):
    answers = iter([False] * (calls - 1) + [True])
    with pytest.raises(Interrupted):
        trained(folder, should_stop=lambda: next(answers), **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run that nothing disturbed; it kept its last two states."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    trained(folder, checkpoint_seconds=0)
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The folder of the same run, stopped on its way, with two states."""
    folder = tmp_path_factory.mktemp("cut") / "results"
    stopped(folder, 6, checkpoint_seconds=0)
    assert len(list((run_in(folder) / "checkpoints").glob("[0-9]*"))) == 2
    return folder


@pytest.fixture(autouse=True)
def unraisable(monkeypatch):
    """What threads couldn't raise; Python would print it as a traceback."""
    _ignore_late_failures.cache_clear()
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    yield
    _ignore_late_failures.cache_clear()
    assert seen == []


def said(capfd):
    """What standard error got; notes take one line each, and nothing else is there."""
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.strip()]
    assert all(line.startswith("scaling-jax: note: ") for line in lines), errors
    return lines


def check_read(whole, damages, to):
    """Every damage to a finished run's records is refused, or changes nothing that is read."""
    before = read_results(whole).runs[0]
    refused = 0
    for damage, folder in copies(whole, to, damages):
        found = attempted(lambda folder=folder: read_results(folder))
        if isinstance(found, UserError):
            assert str(folder) in str(found), damage
            assert "\n" not in str(found)
            refused += 1
            continue
        (run,) = found.runs
        if run.result is None:  # it counts as one that isn't done
            assert damage.file.endswith("result.json")
            assert damage.kind == "deleted"
            continue
        assert run.result == before.result, damage
        assert (run.run, run.corpus) == (before.run, before.corpus), damage
        for name, column in before.course._asdict().items():
            np.testing.assert_array_equal(column, getattr(run.course, name), err_msg=str(damage))
    assert refused > 0.8 * len(damages)


def check_continued(start, whole, damages, to, capfd):
    """After every damage, training ends with the records of the run that nobody disturbed, or refuses in one line."""
    refused = 0
    for damage, folder in copies(start, to, damages):
        capfd.readouterr()
        found = attempted(lambda folder=folder: trained(folder))
        said(capfd)
        if isinstance(found, UserError):
            assert str(folder) in str(found), damage
            assert damage.file.endswith("result.json"), damage  # of a later version, perhaps: not to be written over
            refused += 1
            continue
        place = max((folder / "runs").glob(f"{RUN.run_id}*"))  # beside its own folder if config.json says another run
        assert (place / "metrics.jsonl").read_bytes() == records(whole)["metrics.jsonl"], damage
        assert without_names(whole_result(place)) == without_names(whole_result(run_in(whole))), damage
    assert refused <= 0.2 * len(damages)


def without_names(result):
    """A folder beside gives a result another id, and so another checksum."""
    return dataclasses.replace(result, run_id="", checksum=None)


def record_damages(folder, count):
    return draw(folder, [run_in(folder) / name for name in FILES_OF_RECORDS], count)


def checkpoint_damages(folder, count):
    files = [p for p in (run_in(folder) / "checkpoints").rglob("*") if p.is_file() and p.stat().st_size]
    return draw(folder, files, count, ("bit", "bit", "bit", "cut", "emptied", "zeroed", "deleted", "grown"), seed=1)


def test_damaged_records_of_a_finished_run_are_refused_by_readers(whole, tmp_path):
    check_read(whole, record_damages(whole, 60), tmp_path)


@pytest.mark.long
def test_damaged_records_of_a_finished_run_are_trained_again(whole, tmp_path, capfd):
    check_continued(whole, whole, record_damages(whole, 10), tmp_path, capfd)


@pytest.mark.long
def test_damaged_records_of_a_run_on_its_way_change_nothing_in_the_end(cut, whole, tmp_path, capfd):
    damages = draw(cut, [run_in(cut) / "metrics.jsonl"], len(KINDS))
    check_continued(cut, whole, damages, tmp_path, capfd)


def test_damaged_checkpoints_change_nothing_in_the_end(cut, whole, tmp_path, capfd):
    check_continued(cut, whole, checkpoint_damages(cut, 8), tmp_path, capfd)


@pytest.mark.long
def test_250_damages_to_records_are_refused_by_readers(whole, tmp_path):
    check_read(whole, record_damages(whole, 250), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
def test_250_damages_to_records_change_nothing_in_the_end(part, whole, cut, tmp_path, capfd):
    finished, on_its_way = record_damages(whole, 125), draw(cut, [run_in(cut) / "metrics.jsonl"], 125)
    check_continued(whole, whole, finished[part::5], tmp_path, capfd)
    check_continued(cut, whole, on_its_way[part::5], tmp_path, capfd)


@pytest.mark.long
@pytest.mark.parametrize("part", range(3))
def test_75_damages_to_checkpoints_change_nothing_in_the_end(part, whole, cut, tmp_path, capfd):
    check_continued(cut, whole, checkpoint_damages(cut, 75)[part::3], tmp_path, capfd)


def test_a_result_knows_the_checksum_of_the_records_beside_it(whole):
    run = run_in(whole)
    assert len(whole_result(run).checksum) == 64
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    other = json.dumps(line | {"train_loss": [x + 1e-6 for x in line["train_loss"]]})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[1] = other
    content = "".join(f"{text}\n" for text in lines).encode()
    refused = pytest.raises(UserError, match=rf"{run}: .*metrics\.jsonl .*remove {run}")
    with replaced(run / "metrics.jsonl", content), refused:
        read_metrics(run, read_result(run))


def test_a_result_without_a_checksum_is_read_and_compared_as_far_as_it_goes(whole, tmp_path):
    shutil.copytree(run_in(whole), tmp_path / "old")
    run = tmp_path / "old"
    path = run / "result.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    path.write_text(json.dumps(values))
    assert whole_result(run).checksum is None
    for name, value in {"steps": 39, "tokens": 128, "test_loss": 1.5}.items():
        path.write_text(json.dumps(values | {name: value}))
        with pytest.raises(UserError, match=rf"metrics\.jsonl ends .*{value}.*remove {run}"):
            whole_result(run)
    path.write_text(json.dumps(values))
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1]["train_loss"][0] = None
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(UserError, match=r"metrics\.jsonl has a loss that isn't finite at step"):
        whole_result(run)


@pytest.mark.parametrize("keep", [0, 1, None])
def test_a_state_whose_records_are_lost_is_not_continued_from(keep, cut, whole, tmp_path, capfd):
    """As after a power cut: metrics.jsonl is empty, holds one line, or isn't there."""
    shutil.copytree(cut, tmp_path / "results")
    path = run_in(tmp_path / "results") / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    if keep is not None:
        path.write_bytes(b"".join(lines[:keep]))
    capfd.readouterr()
    trained(tmp_path / "results")
    assert records(tmp_path / "results") == records(whole)
    (line,) = said(capfd)
    assert "metrics.jsonl doesn't reach" in line
    assert "training continues from its start" in line


def test_a_state_is_continued_from_where_the_records_still_agree(cut, whole, tmp_path, capfd):
    shutil.copytree(cut, tmp_path / "results")
    run = run_in(tmp_path / "results")
    older = min(int(p.name) for p in (run / "checkpoints").glob("[0-9]*"))
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    capfd.readouterr()
    trained(tmp_path / "results")
    assert records(tmp_path / "results") == records(whole)
    (line,) = said(capfd)
    assert f"training continues from step {older}" in line


def test_a_state_without_checksums_is_restored(cut, whole, tmp_path, capfd):
    """As version 0.1 wrote them."""
    shutil.copytree(cut, tmp_path / "results")
    for folder in (run_in(tmp_path / "results") / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(folder / "checksums")
    capfd.readouterr()
    trained(tmp_path / "results")
    assert records(tmp_path / "results") == records(whole)
    assert said(capfd) == []


def test_a_finished_run_that_lost_only_its_result_is_not_trained_again(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "results")
    (run_in(tmp_path / "results") / "result.json").unlink()
    seen = []
    trained(tmp_path / "results", on_progress=seen.append)
    assert seen == []
    assert records(tmp_path / "results") == records(whole)


def test_every_command_that_reads_refuses_a_folder_with_a_damaged_run(refuses, scanned, tmp_path):
    """`advise` too, which takes its numbers from measurements.csv."""
    shutil.copytree(scanned, tmp_path / "results")
    folder = tmp_path / "results"
    run = max((folder / "runs").iterdir())
    for content in (b"", None):
        with replaced(run / "metrics.jsonl", content):
            for command in (("fit",), ("report",), ("status",), ("advise", "--target-loss", "2.5")):
                refuses(command[0], folder, *command[1:], names=str(run), watched=(folder,))
