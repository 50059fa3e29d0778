"""The quick demo as a user runs it: to the end, again, and with interruptions."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest


def start(results, cache):
    return subprocess.Popen(
        [sys.executable, "-m", "scaling_jax.cli.main", "demo", "--quick", "--results", str(results)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "SCALING_JAX_CACHE": str(cache), "COLUMNS": "120"},
    )


def to_the_end(results, cache):
    process = start(results, cache)
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    results = tmp_path_factory.mktemp("undisturbed")
    return results, to_the_end(results, cache)


def test_the_demo_measures_a_law_with_a_finite_interval(undisturbed):
    results, output = undisturbed
    fit = json.loads((results / "fit.json").read_text())
    low, high = fit["law"]["exponent_interval"]
    assert low < fit["law"]["exponent"] < high < 0
    for model in ("1x16", "1x32"):
        points = [p for p in fit["points"] if p["model"] == model]
        assert points[-1]["b_crit"] > 1.3 * points[0]["b_crit"]
    assert fit["corpus"]["source"] == "python"
    assert "B_crit = " in output
    figures = {path.name for path in (results / "figures").iterdir()}
    assert {
        f"{name}.{kind}" for name in ("critical_batch_size", "three_measurements") for kind in ("png", "svg")
    } < figures
    assert len(figures) == 30
    assert "report.html" in output
    assert (results / "report.html").stat().st_size > 100_000


def test_measurements_are_steps_that_its_runs_took(undisturbed):
    results, _ = undisturbed
    with (results / "measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * (6 + 7)
    for row in rows:
        assert 1 <= float(row["steps"]) <= int(row["steps_tried"])
        assert math.isclose(float(row["tokens"]), float(row["steps"]) * int(row["batch_tokens"]), rel_tol=1e-8)


def test_a_second_time_trains_nothing(undisturbed, cache):
    results, output = undisturbed
    before = {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*")}
    fit = (results / "fit.json").read_bytes()
    again = to_the_end(results, cache)
    assert {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*")} == before
    assert (results / "fit.json").read_bytes() == fit
    assert output.split("Critical batch size")[1] == again.split("Critical batch size")[1]


@pytest.mark.long
def test_a_demo_interrupted_at_random_moments_ends_with_the_same_bytes(undisturbed, cache, tmp_path):
    draws = random.Random(os.environ.get("SCALING_JAX_TEST_SEED") or time.time_ns())
    for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = start(tmp_path / "results", cache)
        time.sleep(draws.uniform(1, 20))
        process.send_signal(how)
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (130, -signal.SIGKILL, -signal.SIGTERM, 0), errors  # -SIGTERM before the scan
        assert "Traceback" not in errors
        if how == signal.SIGKILL:
            time.sleep(1)
    to_the_end(tmp_path / "results", cache)
    for name in ("fit.json", "measurements.csv", "noise_scale.csv", "experiment.json"):
        assert (tmp_path / "results" / name).read_bytes() == (undisturbed[0] / name).read_bytes(), name
