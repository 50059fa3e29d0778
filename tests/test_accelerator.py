"""benchmarks/accelerator: the rehearsal, and the tables made from what an accelerator gave."""

import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks" / "accelerator"
STAGES = ("right", "fast", "many", "demo", "kaplan")


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"accelerator_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_in_the_docs_are_those_of_the_committed_figures():
    folders = sorted(path for path in (HERE / "results").iterdir() if path.is_dir())
    docs = (ROOT / "docs" / "performance.md").read_text()
    assert folders
    for folder in folders:
        assert load("tables").tables(folder) in docs, f"paste what tables.py {folder} prints"


def test_a_table_has_a_line_for_every_figure(tmp_path):
    rate = {"tokens_per_second": 1_000, "mfu": 0.5, "share_of_product": 0.6, "temporary_gib": 1.5, "compile_seconds": 2}
    stages = {
        "machine": {"card": "card", "jax": "1.2.3", "date": "2026-01-01"},
        "fast": {"4x256, 8 tokens: a": rate, "4x256, 8 tokens: two-batch / without": [1.004, 1.0, 1.01], "seconds": 3},
        "many": {"1x32, 512 tokens, 64 runs": {"speedup": 12.5}},
    }
    for stage, figures in stages.items():
        (tmp_path / f"{stage}.json").write_text(json.dumps(figures))
    lines = load("tables").tables(tmp_path).splitlines()
    assert "| 4x256, 8 tokens: a | 1,000 | 50.0 % | 60 % | 1.5 | 2 s |" in lines
    assert "| 4x256, 8 tokens: two-batch | 1.004 [1.000, 1.010] |" in lines
    assert "| 1x32, 512 tokens, 64 runs | 12.5× |" in lines


def rehearse(tmp_path, python, *options):
    """Rehearses stages; returns the folder of what they wrote, and how each ended."""
    out = tmp_path / "out"
    names = ("JAX_PLATFORMS", "XLA_FLAGS", "PYTHONPATH")
    ended = subprocess.run(
        [HERE / "run.sh", out, "--rehearse", *options],
        env={name: x for name, x in os.environ.items() if name not in names}
        | {"LUGGAGE": str(tmp_path / "luggage"), "PYTHON": str(python), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    stages = json.loads((out / "machine.json").read_text())["stages"]
    return out, {name: stage["status"] for name, stage in stages.items()}


def check_all(out, statuses):
    assert statuses == dict.fromkeys(STAGES, "done")
    right, kaplan = (json.loads((out / f"{stage}.json").read_text()) for stage in ("right", "kaplan"))
    assert right["beyond the limits"] == []
    assert right["same bits, default"] == {"run again": True, "killed and resumed": True}
    assert kaplan["finished runs"] == 12
    assert (out / "kaplan.tar.xz").exists()


@pytest.mark.long
def test_a_stage_of_the_rehearsal(tmp_path):
    (tmp_path / "luggage").mkdir()
    out, statuses = rehearse(tmp_path, sys.executable, "--stages", "many")
    assert statuses == {"many": "done"}
    assert json.loads((out / "many.json").read_text())


@pytest.mark.long
def test_the_rehearsal(tmp_path):
    (tmp_path / "luggage").mkdir()
    check_all(*rehearse(tmp_path, sys.executable))


@pytest.mark.long
def test_the_rehearsal_in_an_environment_with_nothing_but_jax_and_the_wheels(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    environment = os.environ | {"LUGGAGE": str(tmp_path / "luggage"), "PYTHON": str(python)}
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "jax", "flax", "optax", "orbax-checkpoint"], check=True, env=environment
    )
    subprocess.run([HERE / "pack.sh", "--wheels-only", "--python", version], check=True, env=environment)
    check_all(*rehearse(tmp_path, python))
