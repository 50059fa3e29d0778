import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling_jax.io import UserError
from scaling_jax.results import analyse, read_results
from scaling_jax.scanning import Study
from scaling_jax.scanning.by_command import Limits, arguments, check_command, read_curve, train_by_command
from scaling_jax.training.journal import ending
from scaling_jax.training.metrics import MetricsLine, SquaredNorms
from tests.scanning.told import B_CRIT, EXPERIMENT, least_steps, work

ROOT = Path(__file__).parents[2]
SMALL = dataclasses.replace(EXPERIMENT, batch_tokens=(8, 64, 512))
COMMAND = f"{sys.executable} -m tests.scanning.trainer {{batch}} {{learning_rate}} {{max_steps}} {{curve}}"


@pytest.fixture(autouse=True)
def from_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def by_command(folder, fault="", experiment=SMALL):
    said, events = [], []
    train_by_command(
        Study(experiment, folder), f"{COMMAND} {fault}", Limits(jobs=2), say=said.append, on_event=events.append
    )
    return said, events


@pytest.fixture(scope="module")
def by_telling(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    work(folder, SMALL)
    return analyse(folder)


@pytest.mark.parametrize("fault", ["", "csv", "garbage", "half", "dies-once", "starts-over"])
def test_the_scan_is_that_of_a_study(by_telling, tmp_path, fault):
    """Also if a command dies once, starts over, or writes what is no evaluation."""
    said, events = by_command(tmp_path, fault)
    for point, told in zip(analyse(tmp_path).fit.points, by_telling.fit.points, strict=True):
        assert point.tradeoff.s_min == pytest.approx(told.tradeoff.s_min, rel=0.01)
        assert point.tradeoff.b_crit == pytest.approx(told.tradeoff.b_crit, rel=0.03)
    done = [event.cell.batch_tokens for event in events if event.progress is None]
    assert sorted(done) == [8, 64, 512]
    if fault == "dies-once":
        assert said
        assert all("exit code 1; started again, see" in line for line in said)
    elif fault != "starts-over":
        assert said == []


def test_a_run_ends_when_it_cannot_be_the_best(tmp_path):
    by_command(tmp_path)
    results = read_results(tmp_path)
    ends = {record.result.status for record in results.runs}
    assert {"reached", "given up"} <= ends
    for record in results.runs:  # however many evaluations the command wrote before it was stopped
        lines = [
            MetricsLine.read(json.loads(line)) for line in (record.folder / "metrics.jsonl").read_text().splitlines()
        ]
        assert not any(ending(record.run, lines[:k][-2:]) for k in range(1, len(lines)))


def test_a_loss_that_is_no_number_is_a_run_that_diverged(tmp_path):
    by_command(tmp_path, "nan")
    assert {"diverged"} <= {record.result.status for record in read_results(tmp_path).runs}


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("dies", "exit code 1"),
        pytest.param("killed", "killed by SIGKILL", marks=pytest.mark.slow),
        pytest.param("hangs", "wrote no evaluation for", marks=pytest.mark.slow),
        pytest.param("nothing", "wrote no step and loss to", marks=pytest.mark.long),
    ],
)
def test_what_fails_is_named_and_left_and_the_rest_goes_on(tmp_path, fault, why):
    seen = []

    def say(line):
        seen.append(line)

    limits = Limits(jobs=3, retries=1, silent_minutes=0.05 if fault == "hangs" else 30)
    with pytest.raises(UserError, match=f"of the runs failed 2 times and are left, such as net-b.*{why}"):
        train_by_command(Study(SMALL, tmp_path), f"{COMMAND} {fault}", limits, say=say)
    assert len(seen) == 6  # each of three batch sizes, twice
    assert all(why in line and "\n" not in line for line in seen)
    train_by_command(Study(SMALL, tmp_path), COMMAND)  # once it is mended, the same scan goes on
    assert not Study(SMALL, tmp_path).cells_left


def test_an_orphan_keeps_its_setting(tmp_path):
    """A command outlives a scan that was killed. Nobody trains its setting until it has ended."""
    code = (
        "import sys, pathlib; from tests.scanning.test_by_command import *;"
        "by_command(pathlib.Path(sys.argv[1]), 'hangs', experiment=SMALL)"
    )
    scan = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while len(markers := list(tmp_path.glob("commands/*/marker"))) < 2:
        time.sleep(0.1)
    scan.kill()
    scan.wait()
    study = Study(SMALL, tmp_path)
    free = study.ask(wait=False)
    assert free.name not in {marker.parent.name for marker in markers}
    assert study.ask(wait=False) is None
    for marker in markers:
        os.kill(int(marker.read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (again := study.ask(wait=False)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert again.name in {marker.parent.name for marker in markers}


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("", "empty"),
        ("train {batch} {learning_rate}", "needs {curve}"),
        ("train {batch} {rate} {curve}", r"has \{rate\}: choose from \{batch\}"),
        ("train '{batch} {learning_rate} {curve}", "No closing quotation"),
        ("train {batch} {learning_rate} {curve} {", "Single '{'"),
    ],
)
def test_a_command_that_cannot_work_is_refused(command, why):
    with pytest.raises(UserError, match=why):
        check_command(command)


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"can't be started.*no-such-program"):
        train_by_command(Study(SMALL, tmp_path), "no-such-program {batch} {learning_rate} {curve}")


def test_values_stay_one_word_and_no_shell_sees_them(tmp_path):
    folder = tmp_path / "a folder; touch x $(touch y)"
    study = Study(SMALL, folder)
    setting = study.ask()
    words = arguments("run --out={curve} '{batch} x' {learning_rate}", setting, folder / "curve", folder)
    assert words == ["run", f"--out={folder / 'curve'}", f"{setting.batch} x", f"{setting.learning_rate}"]


@pytest.mark.parametrize(
    ("text", "steps", "losses"),
    [
        ('{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 3}\n', [1, 2], [3.5, 3]),
        ('{"step": 1, "loss": 3}\n{"step": 2, "lo', [1], [3]),
        ("step,loss\n1,3\n2,nan\n", [1, 2], [3, math.nan]),
        ("loss,x,step\n3,0,1\n", [1], [3]),
        ('{"step": 5, "loss": 3}\n{"step": 9, "loss": 2}\n{"step": 7, "loss": 1}\n', [5, 7], [3, 1]),
        ('{"step": 1, "loss": null}\n', [1], [math.nan]),
        ("", [], []),
        ("\x00\xff\n[1, 2]\n7\n", [], []),
        ('{"step": 1.5, "loss": 3}\n{"step": true, "loss": 3}\n{"step": 0, "loss": 3}\n', [], []),
        ('{"step": 1, "loss": -1}\n{"step": 2, "loss": true}\n', [], []),
    ],
)
def test_a_curve_is_read_as_far_as_it_is_one(tmp_path, text, steps, losses):
    path = tmp_path / "curve"
    path.write_text(text)
    curve = read_curve(path)
    assert curve.steps == steps
    assert curve.losses == pytest.approx(losses, nan_ok=True)
    assert (curve.problem is None) == bool(steps or not text)


def test_norms_beside_the_losses_are_read(tmp_path):
    path = tmp_path / "curve"
    path.write_text(
        '{"step": 5, "loss": 3, "small_batch": 8, "small_sq_norm": 2.5, "big_sq_norm": 0.5}\n{"step": 6, "loss": 2}\n'
    )
    assert read_curve(path).norms == [SquaredNorms(8, 2.5, 0.5), None]
    path.write_text("big_sq_norm,loss,small_batch,small_sq_norm,step\n0.5,3,8,2.5,5\n,2,,,6\n")
    assert read_curve(path).norms == [SquaredNorms(8, 2.5, 0.5), None]


def test_the_command_line(tmp_path):
    """From the experiment's file to the report, in the unit of the model."""
    file = tmp_path / "mine.py"
    file.write_text("from tests.scanning.told import EXPERIMENT\n")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "scaling_jax.cli.main", "scan", str(file), "--command", COMMAND),
            *("--results", str(tmp_path / "results"), "--jobs", "3"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "images · L^" in run.stdout
    assert "tokens" not in run.stdout
    assert "7 of 7 done" in run.stdout
    fit = analyse(tmp_path / "results").fit
    assert fit.points[0].tradeoff.b_crit == pytest.approx(B_CRIT, rel=0.05)
    assert fit.points[-1].tradeoff.s_min == pytest.approx(least_steps(2.0), rel=0.05)
    page = (tmp_path / "results" / "report.html").read_text()
    assert ">images<" in page or " images" in page


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"jobs": 0}, "jobs = 0 must be"),
        ({"retries": -1}, "retries = -1 must"),
        ({"silent_minutes": 0}, "silent_minutes"),
    ],
)
def test_limits_that_cannot_be_are_refused(wrong, what):
    with pytest.raises(UserError, match=what):
        Limits(**wrong)
