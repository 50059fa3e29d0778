import dataclasses
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import scaling_jax as sj
from scaling_jax.cli import main
from scaling_jax.io.stores import publish, working_copy
from scaling_jax.report.words import short
from scaling_jax.results.runs import last_noise_scale
from scaling_jax.scanning.experiment import QUICK
from scaling_jax.scanning.records import write_experiment
from scaling_jax.training import read_metrics, read_result
from scaling_jax.training.metrics import course
from scaling_jax.training.records import read_run_config
from tests.io.test_stores import move_to_another_machine, objects

WORDS = ("how", "now", "brown", "cow", "the", "quick", "fox", "jumps", "over", "a", "lazy", "dog")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scaling_jax.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains in one folder, by a process of its own, with arguments besides these."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text").mkdir()
    for k in range(30):
        words = random.Random(k).choices(WORDS, k=300)
        (folder / "text" / f"{k}.txt").write_text(" ".join(words))
    model = ("train", "--model", "1x16", "--learning-rate", "3e-3", "--batch-tokens", "1Ki")
    where = ("--text", f"files:{folder}/text/*", "--results", str(folder / "results"), "--set", "eval_growth=1.5")
    return lambda *arguments: run(*model, *where, *arguments)


@pytest.fixture(scope="module")
def trained(train):
    """What a run of 120 steps said, and its folder."""
    done = train("--max-steps", "120")
    assert done.returncode == 0, done.stderr
    return done.stdout, Path(done.stdout.splitlines()[-1].removeprefix("records: "))


def test_a_users_mistake_is_one_line_and_exit_code_2():
    """Of a process of its own; `tests/robustness` has the mistakes."""
    done = run("fit", "/nowhere")
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
    assert "scan" in done.stderr  # whose folder it takes
    assert done.stderr.count("\n") == 1


def test_the_version_is_the_packages(cli):
    assert cli("--version").output == f"scaling-jax {importlib.metadata.version('scaling-jax')}\n"


def test_one_run_is_trained_and_then_known(train, trained):
    said, folder = trained
    assert "note:" not in said
    assert "step 120 of 120" in said
    result = read_result(folder)
    ending, noise, records = said.splitlines()[-3:]
    assert "reached max_steps (120)" in ending
    assert "123k tokens" in ending
    assert f"{result.test_loss:.4f}" in ending
    found = last_noise_scale(course(read_metrics(folder)))
    assert found.resolved
    for value in (found.value, found.low, found.high):
        assert short(value) in noise
    assert f"last {found.steps} steps" in noise
    assert f"{found.confidence:.0%}" in noise.replace(" %", "%")
    again = train("--max-steps", "120")
    assert again.stdout.splitlines() == [ending, noise, records]


def test_a_run_with_other_arguments_says_that_it_starts_beside_the_first(train, trained):
    results = trained[1].parents[1]
    said = train("--max-steps", "3", "--seed", "1").stdout.splitlines()
    assert f"{results} holds 1 other run" in said[0]
    assert "[" not in said[-2]  # three steps have no interval
    again = train("--max-steps", "3", "--seed", "1").stdout
    assert "note:" not in again
    third = train("--max-steps", "3", "--seed", "2").stdout.splitlines()
    assert f"{results} holds 2 other runs" in third[0]
    assert len(list(results.glob("runs/*/result.json"))) == 3


def test_the_sharding_changes_the_small_batch_and_not_the_run(train, trained):
    """Two runs of the same seed, with and without; of the eight devices each has two sequences of 64 tokens."""
    results = trained[1].parents[1]
    done = train("--max-steps", "4", "--seed", "3", "--sharding", "fsdp")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1].removeprefix("records: "))
    assert {line.small_batch_tokens for line in read_metrics(folder)} == {512}
    again = train("--max-steps", "4", "--seed", "3")
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    shutil.rmtree(results / "runs" / folder.name)


def test_single_runs_have_a_status_and_a_report_and_no_fit(trained, cli, tmp_path):
    results = shutil.copytree(trained[1].parents[1], tmp_path / "trained")
    (results / "runs" / trained[1].name / "result.json").unlink()  # as if it had been lost
    label = read_run_config(trained[1]).run.label
    status = cli("status", results)
    assert status.code == 0
    (line,) = [line for line in status.output.splitlines() if line.startswith(label)]
    assert "interrupted" in line
    found = json.loads(cli("status", results, "--json").output)
    assert found["what"] == "runs"
    assert found["running"] is False
    reported = cli("report", results)
    assert reported.output.splitlines() == [f"report: {results}/report.html"]
    assert label.split("-")[0] in (results / "report.html").read_text()
    refused = cli("fit", results)
    assert refused.code == 2
    assert refused.errors.count("\n") == 1
    assert str(results) in refused.errors
    assert "scan" in refused.errors.replace(str(results), "")  # what it takes


@pytest.mark.long
def test_a_scan_in_a_bucket_is_fitted_reported_and_advised_on_from_another_machine(
    bucket, made_up, monkeypatch, tmp_path
):
    copy = working_copy(f"{bucket}/x")
    shutil.copytree(made_up[1], copy, dirs_exist_ok=True)
    publish(copy)
    move_to_another_machine(monkeypatch, tmp_path)
    reported = run("report", f"{bucket}/x")
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.endswith(f" {bucket}/x\n")
    there = objects(bucket)
    assert {"x/report.html", "x/fit.json", "x/measurements.csv", "x/figures/critical_batch_size.png"} <= there.keys()
    move_to_another_machine(monkeypatch, tmp_path / "third")
    advised = run("advise", f"{bucket}/x", "--target-loss", "2.2", "--json")
    shutil.copytree(made_up[1], tmp_path / "local")
    assert run("fit", str(tmp_path / "local")).returncode == 0
    assert advised.stdout == run("advise", str(tmp_path / "local"), "--target-loss", "2.2", "--json").stdout != ""
    assert "14 of 14" in run("status", f"{bucket}/x").stdout


def test_an_interrupt_while_a_dataclass_is_made_has_the_exit_code_of_any_other(tmp_path):
    """Python makes them by `exec`, and remembers an interrupt there as one that nobody handled."""
    (tmp_path / "interrupted.py").write_text(
        "import types, scaling_jax.cli.main as cli\n"
        "cli.app = types.SimpleNamespace(cli=lambda **_: exec('raise KeyboardInterrupt'))\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-m", "interrupted"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "stopped; run the same command again to continue\n")


def test_an_unknown_option_is_refused():
    done = run("demo", "--quik")
    assert done.returncode == 2
    assert "--quick" in done.stdout + done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['scaling-jax', '--help']\n"
        "from scaling_jax.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_a_scan_in_a_folder_of_another_experiment_is_refused(tmp_path):
    write_experiment(tmp_path, dataclasses.replace(QUICK, tokenizer="gpt2"))
    done = run("demo", "--quick", "--results", str(tmp_path))
    assert done.returncode == 2
    assert "holds another experiment" in done.stderr
    assert "'gpt2', not 'bytes'" in done.stderr
    assert "--results" in done.stderr
    (tmp_path / "experiment.json").write_text("{}\n")
    damaged = run("demo", "--quick", "--results", str(tmp_path))
    assert damaged.returncode == 2
    assert f"{tmp_path}/experiment.json" in damaged.stderr
    assert damaged.stderr.count("\n") == 1


def test_every_public_name_is_there():
    for name in sj.__all__:
        assert getattr(sj, name) is not None
    assert callable(sj.scan)
    assert callable(sj.train)


@pytest.mark.parametrize(
    ("chosen", "there", "left_out"),
    [({}, (), True), ({}, ("/dev/vfio/*",), False), ({"TPU_NAME": "a"}, (), False), ({"JAX_PLATFORMS": ""}, (), False)],
)
def test_libtpu_without_a_tpu_is_left_out_unless_the_user_chose(chosen, there, left_out, tmp_path, monkeypatch):
    (tmp_path / "libtpu.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "environ", {**chosen})
    monkeypatch.setattr(main.glob, "glob", lambda pattern: [pattern] if pattern in there else [])
    monkeypatch.setattr(main.importlib.metadata, "entry_points", lambda group: [])
    main._leave_out_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == ("cpu" if left_out else chosen.get("JAX_PLATFORMS"))
