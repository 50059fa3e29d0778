import shutil
import subprocess
import sys

import pytest

import scaling_jax as sj
from scaling_jax.io.stores import publish, working_copy
from tests.training.test_buckets import move_to_another_machine, objects


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scaling_jax.cli.main", *arguments], capture_output=True, text=True, check=False, timeout=100
    )


def test_a_users_mistake_is_one_line_and_exit_code_2():
    """Of a process of its own; `tests/robustness` has the mistakes."""
    done = run("fit", "/nowhere")
    assert done.returncode == 2
    assert "/nowhere holds no scan" in done.stderr
    assert done.stderr.count("\n") == 1


def test_one_run_is_trained_and_then_known(tmp_path):
    (tmp_path / "text").mkdir()
    for k in range(30):
        (tmp_path / "text" / f"{k}.txt").write_text("how now brown cow " * 40)
    command = ("train", "--model", "1x16", "--learning-rate", "1e-2", "--batch-tokens", "1024", "--max-steps", "12")
    options = ("--text", f"files:{tmp_path}/text/*", "--results", str(tmp_path / "results"))
    first, second = run(*command, *options), run(*command, *options)
    assert first.returncode == second.returncode == 0, first.stderr
    assert "step 12 of 12" in first.stdout
    assert "exhausted after 12 steps, 12.3k tokens" in first.stdout
    assert second.stdout.splitlines() == first.stdout.splitlines()[-1:]


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
    assert reported.stdout.endswith(f"all of it is in {bucket}/x\n")
    there = objects(bucket)
    assert {"x/report.html", "x/fit.json", "x/measurements.csv", "x/figures/critical_batch_size.png"} <= there.keys()
    move_to_another_machine(monkeypatch, tmp_path / "third")
    advised = run("advise", f"{bucket}/x", "--target-loss", "2.2", "--json")
    shutil.copytree(made_up[1], tmp_path / "local")
    assert run("fit", str(tmp_path / "local")).returncode == 0
    assert advised.stdout == run("advise", str(tmp_path / "local"), "--target-loss", "2.2", "--json").stdout != ""
    assert "14 of 14" in run("status", f"{bucket}/x").stdout


def test_an_unknown_option_is_refused():
    done = run("demo", "--quik")
    assert done.returncode == 2
    assert "--quick" in done.stdout + done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['scaling-jax', '--help']\n"
        "import scaling_jax.cli\n"
        "try: scaling_jax.cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_a_scan_in_a_folder_of_another_experiment_is_refused(tmp_path):
    (tmp_path / "experiment.json").write_text("{}\n")
    done = run("demo", "--quick", "--results", str(tmp_path))
    assert done.returncode == 2
    assert "holds another experiment" in done.stderr


def test_every_public_name_is_there():
    for name in sj.__all__:
        assert getattr(sj, name) is not None
    assert callable(sj.scan)
    assert callable(sj.train)
