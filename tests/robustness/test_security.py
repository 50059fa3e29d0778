"""A results folder, a table or a text from somebody else: links, pipes, devices and names that reach for more."""

import csv
import json
import os
import shutil
import signal
from typing import NamedTuple

import pytest

from scaling_jax.io import UserError
from scaling_jax.io.files import append_line, cell_text, open_plain, read_lines, read_whole, write_json, write_rows
from scaling_jax.io.locks import lock_state, locked
from scaling_jax.results.table import read_table
from scaling_jax.training import train
from tests.robustness.conftest import replaced
from tests.training.counting import CORPUS, RUN

SECRET = "a file of the user\n"


@pytest.fixture
def outside(tmp_path):
    """A file outside of the results folder, which nothing may touch."""
    path = tmp_path / "outside" / "precious"
    path.parent.mkdir()
    path.write_text(SECRET)
    yield path
    assert path.read_text() == SECRET
    assert list(path.parent.iterdir()) == [path]


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


WRITERS = {
    "whole": lambda path: write_json(path, {}),
    "append": lambda path: append_line(path, {}),
    "lock": lambda path: locked(path, "it").__enter__(),
    "log": lambda path: open_plain(path, "w").close(),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_writing_follows_and_replaces_no_link(write, tmp_path, outside):
    for target in (outside, outside.parent / "not there", outside.parent):
        path = link(tmp_path / "results" / "file", target)
        with pytest.raises(UserError, match=rf"^{path} is a link, not a plain file: [^\n]*$"):
            write(path)
        assert path.is_symlink()
        assert list(path.parent.iterdir()) == [path]
        path.unlink()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_writing_replaces_no_pipe_and_no_folder(write, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match=f"{name} is a {name}, not a plain file"):
            write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_begun_under_a_name_that_is_a_link_goes_nowhere_else(tmp_path, outside):
    link(tmp_path / f".a.json.{os.getpid()}.unfinished", outside)
    write_json(tmp_path / "a.json", {"new": 1})
    assert not (tmp_path / "a.json").is_symlink()
    assert (tmp_path / "a.json").read_text() == '{\n  "new": 1\n}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's devices")
def test_a_ramp_replaces_no_device(refuses, measured):
    """As root, a file renamed onto a device takes its place."""
    arguments = ("advise", measured, "--target-loss", "2.6", "--write-ramp")
    refuses(*arguments, "/dev/full", names="/dev/full is a device, not a plain file", watched=(measured.parent,))
    assert os.path.exists("/dev/full")
    assert not os.path.isfile("/dev/full")


@pytest.fixture
def soon(monkeypatch):
    """Fails a test that waits for ever, as a reader of a pipe does."""

    def fail(*_):
        raise AssertionError("waits for the other end of a pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("command", ["fit", "report", "status", "advise --target-loss 2.5"])
@pytest.mark.parametrize("name", ["experiment.json", "measurements.csv", "cells/*.json", "runs/*/metrics.jsonl"])
def test_a_pipe_in_a_folder_is_named_and_holds_nothing_up(command, name, tmp_path, scanned, cli, soon):
    folder = tmp_path / "scan"
    shutil.copytree(scanned, folder)
    path = next(folder.glob(name))
    path.unlink()
    os.mkfifo(path)
    reads_tables = command.startswith("advise")
    is_read = name in ("experiment.json", "runs/*/metrics.jsonl") and not reads_tables
    is_read |= name == "measurements.csv" and command != "status"
    command, *options = command.split()
    done = cli(command, folder, *options)
    if is_read:
        assert done.code == 2
        assert done.errors.count("\n") == 1
        assert f"{path} is a pipe, not a plain file" in done.errors
    assert path.is_fifo()


def test_readers_take_plain_files_up_to_a_size(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(UserError, match=r"large has more than 256 MiB"):
        read_whole(tmp_path / "large")
    with pytest.raises(UserError, match=r"large line 1 has more than 64 MiB"):
        list(read_lines(tmp_path / "large"))
    with pytest.raises(UserError, match="/dev/zero is a device"):
        read_whole(link(tmp_path / "zeros", "/dev/zero").resolve())
    with pytest.raises(UserError, match="zeros is a device"):
        list(read_lines(tmp_path / "zeros"))
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="is a pipe"):
        lock_state(tmp_path / ".lock")


@pytest.mark.parametrize("name", ["runs", f"runs/{RUN.run_id}", f"runs/{RUN.run_id}/checkpoints"])
def test_training_writes_through_no_folder_that_is_a_link(name, tmp_path, outside):
    link(tmp_path / "results" / name, outside.parent)
    with pytest.raises(UserError, match=rf"{name} is a link, so results would go elsewhere"):
        train(RUN, tmp_path / "results", corpus=CORPUS, num_devices=1)


def test_a_results_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "large disk").mkdir()
    results = link(tmp_path / "results", tmp_path / "large disk")
    result = train(RUN, results, corpus=CORPUS, num_devices=1)
    assert result.steps == train(RUN, tmp_path / "large disk", corpus=CORPUS, num_devices=1).steps
    assert [path.name for path in (tmp_path / "large disk" / "runs").iterdir()] == [RUN.run_id]


def test_figures_go_nowhere_else(refuses, scanned, tmp_path, outside):
    folder = tmp_path / "scan"
    shutil.copytree(scanned, folder)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    link(folder / "figures", outside.parent)
    refuses("report", folder, names=f"{folder / 'figures'} is a link, so results would go elsewhere")


@pytest.mark.parametrize("run", ["../../outside", "/etc", "..", "", "a\\b"])
def test_a_run_id_leads_nowhere_else(refuses, scanned, run):
    path = next((scanned / "cells").glob("*.json"))
    values = json.loads(path.read_text())
    with replaced(path, json.dumps(values | {"runs": [run]}).encode()):
        refuses("fit", scanned, names=f"{path} is from another version, or damaged", watched=(scanned,))


class Row(NamedTuple):
    model: str
    loss: float


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_name_is_no_formula_in_the_tables_that_are_written(tmp_path, name):
    write_rows(tmp_path / "a.csv", Row, [Row(name, -2.5), Row("'plain", 1.0)])
    with (tmp_path / "a.csv").open(newline="") as file:
        first, second = list(csv.reader(file))[1:]
    assert first[0][0] == "'"
    assert first[1] == "-2.5"
    assert [cell_text(first[0]), cell_text(second[0])] == [name, "'plain"]


def test_names_that_look_like_formulas_come_through_a_fit(measured):
    written = measured.read_text()
    measured.write_text(written.replace("\nm,", "\n'=m,"))
    assert {*read_table(measured).model} == {"=m"}
