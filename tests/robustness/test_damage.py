"""Results that were damaged or that another version wrote: named by file, line and remedy, and left as they are."""

import json

import pytest

from scaling_jax.io import UserError
from scaling_jax.results import read_experiment
from scaling_jax.results.branches import read_branches
from scaling_jax.scanning.search import best_of, finished
from scaling_jax.training.records import read_metrics, read_result, read_run_config, read_timed_metrics
from tests.robustness.conftest import replaced

NO_JSON = (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'"text"', b"3", b"NaN")


@pytest.fixture(scope="module")
def run(scanned):
    """The folder of a run that every command reads."""
    experiment = read_experiment(scanned)
    best = best_of(finished(experiment, experiment.groups[0], scanned))
    return scanned / "runs" / best.run.run_id


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
        for command in (("fit", scanned), ("report", scanned), ("status", scanned)):
            refuses(*command, names=str(path), watched=(scanned,))


def test_a_missing_result_is_a_run_that_is_missing(refuses, scanned, run):
    with replaced(run / "result.json", None):
        refuses("fit", scanned, names="run the scan again, it continues", watched=(scanned,))


@pytest.mark.parametrize(
    "damage",
    [
        *NO_JSON[:-1],
        b'{"step": "4"}',
        b'{"test_loss": 3.0}',
        b'{"step": 1, "test_loss": "low"}',
        b'{"step": 1, "test_loss": [3]}',
        b'{"step": 1, "small_sq_norm": 3}',
        b'{"step": 1, "small_sq_norm": ["a"]}',
        b'{"step": 1, "big_sq_norm": [{}]}',
        b'{"step": 1}{"step": 2}',
        b"\x00" * 64,
    ],
)
def test_a_damaged_line_of_metrics_is_named_by_its_number(damage, run):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    third, said = b"".join([*lines[:2], damage, b"\n", *lines[2:]]), r"metrics\.jsonl line 3 is damaged .*: remove "
    with replaced(path, third), pytest.raises(UserError, match=said):
        read_metrics(run)
    with replaced(path, b"".join([*lines, damage])):
        assert len(read_metrics(run)) == len(lines)  # the last line is still being written


def test_damaged_metrics_stop_every_command_that_reads_them(refuses, scanned, run):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    without_moments = [json.dumps({"step": line["step"], "test_loss": line["test_loss"]}) for line in read_metrics(run)]
    with replaced(path, b"?\n" + b"".join(lines)):
        for command in (("fit", scanned), ("status", scanned), ("branch", scanned, "--batch-tokens", "128")):
            refuses(*command, names="metrics.jsonl line 1 is damaged", watched=(scanned,))
    with replaced(path, "\n".join([*without_moments, ""]).encode()):
        refuses("fit", scanned, names="metrics.jsonl has no 'small_sq_norm'", watched=(scanned,))


def test_a_damaged_clock_leaves_only_its_times_out(run):
    whole = read_metrics(run)
    for content in (*NO_JSON, b'{"step": []}', b'{"step": 1, "time": "noon"}', b'{"step": {}, "time": 1}'):
        (run / "clock.jsonl").write_bytes(content + b'\n{"step": %d, "time": 12.5}\n' % whole[0]["step"])
        assert read_timed_metrics(run) == [whole[0] | {"time": 12.5}, *whole[1:]]
    (run / "clock.jsonl").unlink()


@pytest.mark.parametrize("content", [*NO_JSON, b'{"run": {}}', b'{"run": [], "corpus": {}}'])
def test_a_damaged_configuration_is_named(content, run):
    with replaced(run / "config.json", content), pytest.raises(UserError, match=r"config\.json is damaged"):
        read_run_config(run)


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
def test_a_ramp_that_is_none_is_refused_by_its_file(text, refuses, tmp_path):
    (tmp_path / "ramp.json").write_text(text)
    refuses("train", "--learning-rate", "1", "--max-steps", "3", "--ramp", tmp_path / "ramp.json", names="ramp.json")


def test_a_scan_that_runs_is_not_begun_twice(refuses, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    import os

    folder = tmp_path / "results"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        refuses("demo", "--quick", "--results", folder, names=f"in use by process {os.getpid()}", watched=(folder,))
