"""Results that were damaged or that another version wrote: named by file, line and remedy, and left as they are."""

import json
import math
import os

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.results import read_results
from scaling_jax.results.branches import read_branches
from scaling_jax.results.status import read_status
from scaling_jax.scanning import Cell
from scaling_jax.scanning.records import read_search
from scaling_jax.training.metrics import MetricsLine, course
from scaling_jax.training.records import read_clock, read_metrics, read_result, read_run_config
from scaling_jax.training.stages import read_stages
from tests.robustness.conftest import contents, replaced

NO_JSON = (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'"text"', b"3", b"NaN")


@pytest.fixture(scope="module")
def run(scanned):
    """The folder of a run that every command reads."""
    return read_results(scanned).cells[0].record.folder


def changed(path, drop=(), **values):
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    return json.dumps(kept | values).encode()


def damaged_results(path):
    yield from NO_JSON
    for key in ("run_id", "status", "steps", "tokens", "test_loss", "corpus_sha256"):
        yield changed(path, drop=[key])
        yield changed(path, **{key: {}})
    yield changed(path, steps="9")
    yield changed(path, status="abandoned")
    yield changed(path, of_tomorrow=1)


def test_a_damaged_result_is_named_with_the_way_out(refuses, scanned, run):
    path = run / "result.json"
    for content in list(damaged_results(path)):
        with replaced(path, content), pytest.raises(UserError, match=r"result\.json .*: remove .*trains it again"):
            read_result(run)
    with replaced(path, b"{"):
        for read in (read_results, read_status):
            with pytest.raises(UserError, match=str(path)):
                read(scanned)
        refuses("report", scanned, names=str(path), watched=(scanned,))


def test_a_missing_result_is_a_run_that_is_missing(refuses, scanned, run):
    with replaced(run / "result.json", None):
        refuses("fit", scanned, names="1x16 · 128 tokens isn't done", watched=(scanned,))


def damaged_lines(line):
    """Of what a line says, something that can't be."""
    for name in ("step", "tokens", "batch_tokens", "small_batch_tokens"):
        for value in ("4", None, True, 0, -1, 2.5, 2**64, [line[name]]):
            yield line | {name: value}
    for name in ("train_loss", "small_sq_norm", "big_sq_norm", "small_sq_norm_by_layer", "big_sq_norm_by_layer"):
        for value in (3, "3", {}, ["a"], [{}], [[1.0]], [True], line[name][:-1], [*line[name], 1.0]):
            yield line | {name: value}
    for name in ("step", "tokens", "batch_tokens", "small_batch_tokens", "train_loss", "small_sq_norm", "big_sq_norm"):
        yield {key: value for key, value in line.items() if key != name}
    for value in ("low", [3], {}, True, 0, -1.0):
        yield line | {"test_loss": value}
    for name in ("epoch", "test_bits_per_byte"):
        yield line | {name: "x"}
        yield line | {name: [1]}
    yield line | {"live": "x"}
    yield line | {"step": line["step"] + 1}  # a step is missing


def test_a_damaged_line_of_metrics_is_named_by_its_number(run):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [json.dumps(values).encode() for values in damaged_lines(json.loads(lines[2]))]
    for damage in (*NO_JSON, b'{"step": 1}{"step": 2}', b"\x00" * 64, lines[1][:-1], *damaged):
        third = b"".join([*lines[:2], damage, b"\n", *lines[3:]])
        with replaced(path, third), pytest.raises(UserError) as refused:
            read_metrics(run)
        assert f"{path} line 3 is damaged" in str(refused.value), damage
        assert f"remove {run}" in str(refused.value)
    for damage in (b'{"step": "4"}', lines[-1][:-1], b"{"):
        with replaced(path, b"".join([*lines, damage])):
            assert len(read_metrics(run)) == len(lines)  # the last line is still being written


def test_losses_that_were_not_finite_are_no_damage(run):
    path, lines = run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    third = json.loads(lines[2])
    third |= {"test_loss": None, "train_loss": [None] * len(third["train_loss"])}
    with replaced(path, b"".join([*lines[:2], json.dumps(third).encode(), b"\n", *lines[3:]])):
        line = read_metrics(run)[2]
        assert line.evaluated
        assert math.isnan(line.test_loss)
        assert np.all(np.isnan(line.train_loss))
        assert line.step not in course(read_metrics(run)).eval_steps
        assert MetricsLine.read(line.json()).json() == line.json() == third


def test_damaged_metrics_stop_all_that_read_them(scanned, run):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    without_moments = json.loads(lines[0])
    del without_moments["small_sq_norm"]
    cases = {
        "line 1 is damaged": b"?\n" + b"".join(lines),
        "line 1 is damaged .*small_sq_norm": json.dumps(without_moments).encode() + b"\n" + b"".join(lines[1:]),
        "ends at step .* the run": b"".join(lines[:-1]),  # the result says that there are more
    }
    for names, content in cases.items():
        with replaced(path, content):
            before = contents(scanned)
            for read in (read_results, read_status):
                with pytest.raises(UserError, match=rf"metrics\.jsonl {names}.* remove"):
                    read(scanned)
            assert contents(scanned) == before


def test_the_command_names_damaged_metrics_in_one_line(refuses, scanned, run):
    path = run / "metrics.jsonl"
    with replaced(path, b"?\n" + path.read_bytes()):
        for command in (("fit", scanned), ("branch", scanned, "--batch-tokens", "128")):
            refuses(*command, names=f"{path} line 1 is damaged", watched=(scanned,))


def test_a_damaged_clock_leaves_only_its_times_out(run):
    step = read_metrics(run)[0].step
    for content in (*NO_JSON, b'{"step": []}', b'{"step": 1, "time": "noon"}', b'{"step": {}, "time": 1}'):
        (run / "clock.jsonl").write_bytes(content + b'\n{"step": %d, "time": 12.5}\n' % step)
        assert read_clock(run) == {step: 12.5}
    (run / "clock.jsonl").unlink()
    assert read_clock(run) == {}


def test_a_damaged_record_of_a_search_is_named_with_the_way_out(scanned):
    cell = Cell("1x16", 128, 0)
    path, results = scanned / "cells" / f"{cell.file_name}.json", read_results(scanned)
    for content in (*NO_JSON, b'{"of_tomorrow": 1}', changed(path, runs="x"), changed(path, drop=["model"])):
        with replaced(path, content), pytest.raises(UserError, match=rf"{path} .*: remove it"):
            read_search(scanned, cell)
    with replaced(path, b"{"):
        for read in (lambda: read_status(scanned), results.fit):
            with pytest.raises(UserError, match=rf"{path} .*: remove it"):
                read()
    with replaced(path, None):  # a search that hasn't ended
        assert read_search(scanned, cell) is None
        with pytest.raises(UserError, match=cell.name):
            results.fit()


@pytest.mark.parametrize(
    "content",
    [
        *NO_JSON,
        b'{"run": {}}',
        b'{"run": [], "corpus": {}}',
        b'{"run": {}, "corpus": {}}',
        b'{"schema": 3}',
        b'{"schema": "2"}',
    ],
)
def test_a_damaged_configuration_is_named(content, run):
    with replaced(run / "config.json", content):
        with pytest.raises(UserError, match=rf"{run}/config\.json is damaged .*: remove {run}"):
            read_run_config(run)
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            read_results(run.parents[1])


BRANCHES = "model,batch_tokens,seed,tokens,loss,b_crit,low,high\n1x16,128,0,1000,3.0,500,400,600\n"


@pytest.mark.parametrize(
    "text",
    [
        BRANCHES.replace("500", "many"),
        BRANCHES.replace(",600", ""),
        BRANCHES.replace("b_crit", "b_opt"),
        BRANCHES.replace("128", ""),
        "a\n1\n",
        BRANCHES.replace("500", "5\x000"),
        BRANCHES + "\udcff",
    ],
)
def test_damaged_branches_are_named_by_line(text, tmp_path):
    (tmp_path / "branches.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"branches\.csv"):
        read_branches(tmp_path)
    (tmp_path / "branches.csv").write_text(BRANCHES)
    assert read_branches(tmp_path)[0].b_crit == 500


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[1]", "[{}]", '[{"tokens": 0}]', '[{"tokens": 5, "batch_tokens": 128}]',
     '[{"tokens": 0, "batch_tokens": "128"}]', '[{"tokens": 0, "batch_tokens": 128, "lr": 1}]',
     '[{"tokens": 0, "batch_tokens": 128, "learning_rate_factor": NaN}]', '"x"', "[" * 100_000],
)  # fmt: skip
def test_a_ramp_that_is_none_is_refused_by_its_file(text, tmp_path):
    (tmp_path / "ramp.json").write_text(text)
    with pytest.raises(UserError, match=r"ramp\.json"):
        read_stages(tmp_path / "ramp.json")


def test_a_scan_that_runs_is_not_begun_twice(refuses, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "results"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        refuses("demo", "--quick", "--results", folder, names=f"in use by process {os.getpid()}", watched=(folder,))
