import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.cli.main import main
from scaling_jax.results.table import fit_table
from tests.fitting.planted import Planted


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("advice") / "measurements.csv"
    columns = Planted(noise=0.02).columns(np.random.default_rng(0))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "batch_tokens", "target_loss", "steps", "seed"])
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.fixture
def scaling_jax(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scaling-jax", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return (code, *capsys.readouterr())

    return run


def test_advise_answers_for_a_table_and_for_its_folder(table, tmp_path, scaling_jax):
    options = ("--target-loss", 2, "--budget-tokens", 1e8, "--write-ramp", tmp_path / "ramp.json")
    hardware = ("--devices", 8, "--tokens-per-second", 1e5, "--device-batch-tokens", 256)
    of_file, of_folder = (scaling_jax("advise", path, *options, *hardware) for path in (table, table.parent))
    assert of_file[0] == 0, of_file[2]
    assert of_file == of_folder
    for word in ("knee", "within the budget", "fastest on 8 devices", "ramp by the local B_crit: ", "by the law"):
        assert word in " ".join(of_file[1].split())
    assert " lr " not in of_file[1].split("batch and tokens")[0]  # the table has none
    stages = json.loads((tmp_path / "ramp.json").read_text())
    assert [set(stage) for stage in stages] == [{"tokens", "batch_tokens", "learning_rate_factor"}] * len(stages)
    assert stages[0]["tokens"] == 0


def test_a_ramp_that_train_would_refuse_is_refused_for_a_scan_and_noted_for_a_table(
    table, made_up, tmp_path, scaling_jax
):
    """A table doesn't say how long a sequence is; a scan does."""
    scan = shutil.copytree(made_up[1], tmp_path / "scan")
    assert scaling_jax("fit", scan)[0] == 0
    ramp = ("--target-loss", 2.2, "--write-ramp", tmp_path / "ramp.json", "--start-batch-tokens")
    code, _, stderr = scaling_jax("advise", scan, *ramp, 64)
    assert code == 2
    assert "start_batch_tokens = 64 must be two or more whole sequences of 64 tokens: use 128" in stderr
    assert not (tmp_path / "ramp.json").exists()
    assert scaling_jax("advise", scan, *ramp, 128)[0] == 0
    notes = {start: " ".join(scaling_jax("advise", table, *ramp, start)[1].split()) for start in (64, 128)}
    assert "train takes two or more whole sequences" in notes[64]
    assert "train takes two or more whole sequences" not in notes[128]


def test_fit_takes_a_table(table, scaling_jax):
    code, stdout, stderr = scaling_jax("fit", table)
    assert code == 0, stderr
    assert "all runs at once" in stdout
    assert json.loads(table.with_suffix(".fit.json").read_text())["law"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-loss", 1), "1.75 to 2.9"),
        (("--target-loss", 2, "--budget-tokens", 10), "needs more than"),
        (("--target-loss", 2, "--devices", 8), "--devices and --tokens-per-second"),
        (("--target-loss", 2, "--model", "big"), "choose from model"),
        (("--target-loss", -2), "must be positive"),
    ],
)
def test_a_question_without_an_answer_is_one_line_and_exit_code_2(table, options, message, scaling_jax):
    code, _, stderr = scaling_jax("advise", table, *options)
    assert code == 2
    assert message in stderr
    assert stderr.count("\n") == 1


def test_results_that_are_not_there_are_refused(tmp_path, scaling_jax):
    code, _, stderr = scaling_jax("advise", tmp_path, "--target-loss", 2)
    assert code == 2
    assert "give a results folder after `scaling-jax fit`, or a CSV" in stderr


def test_extrapolated_advice_says_so(table, scaling_jax):
    code, stdout, _ = scaling_jax("advise", table, "--target-loss", 1.5, "--extrapolate")
    assert code == 0
    assert "EXTRAPOLATED" in stdout
    assert "bracket" in stdout
    assert "unknown" not in stdout
    assert "ramp by" not in stdout
    assert "unknown" in scaling_jax("advise", table, "--target-loss", 1.2, "--extrapolate")[1]


DEMO = Path(__file__).parents[2] / "experiments/results/demo/measurements.csv"


def test_advice_on_the_demo_gives_one_b_crit_first_then_the_local_one_then_the_law(scaling_jax):
    code, stdout, stderr = scaling_jax("advise", DEMO, "--target-loss", 2.2, "--reference-batch-tokens", 512, "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    to = found["to"]
    assert to["e_min"] == pytest.approx(to["s_min"] * to["b_crit"])  # hyperbolas
    low, high = to["b_crit_interval"]
    assert low < to["b_crit"] < high
    assert to["local_b_crit"] > to["b_crit"]
    assert to["law_b_crit"] is not None
    assert found["follows"] == "local"
    assert found["reference_batch_tokens"] == 512
    assert found["cbs20"] > 1.2 * 512
    sources = {row["batch_tokens"]: row["learning_rate_source"] for row in found["rows"]}
    assert sources[512] == "tuned"
    assert sources[16_384] == "tuned"
    words = " ".join(scaling_jax("advise", DEMO, "--target-loss", 2.2)[1].split())
    places = [words.index(text) for text in ("B_crit (the knee)", "local B_crit, of", "B_crit by the law")]
    assert places == sorted(places)
    assert "off by some percent" not in words


def test_steps_on_the_demo_are_those_of_its_fit(scaling_jax):
    """At a measured loss, advice adds no error of its own to the fit's."""
    found = json.loads(scaling_jax("advise", DEMO, "--target-loss", 2.201, "--model", "2x64", "--json")[1])
    points = fit_table(DEMO, laws=False).fit.points
    point = next(point for point in points if (point.model, point.loss) == ("2x64", 2.201))
    batches = [row["batch_tokens"] for row in found["rows"]]
    assert len(batches) >= 5
    np.testing.assert_allclose([row["steps"] for row in found["rows"]], point.steps_at(batches), rtol=1e-9)
