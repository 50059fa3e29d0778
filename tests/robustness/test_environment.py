"""Settings of the environment that can't be: one line each, at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling_jax.io import UserError
from scaling_jax.io.stores import cache_folder
from scaling_jax.parallel.processes import connect
from tests.training.test_processes import free_port


def command(*arguments, **environment):
    """`scaling-jax …` in a process of its own, because JAX and matplotlib read the environment once."""
    return subprocess.run(
        [sys.executable, "-m", "scaling_jax.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("platform", ["nosuch", "rocm"])
def test_a_platform_that_is_not_there_is_named(platform):
    done = command("demo", "--quick", "--dry-run", JAX_PLATFORMS=platform)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"scaling-jax: JAX can't start with JAX_PLATFORMS={platform}")
    assert "Traceback" not in done.stderr


def test_a_flag_of_jax_that_cannot_be_is_named():
    done = command("demo", "--quick", "--dry-run", JAX_NUM_CPU_DEVICES="x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("scaling-jax: JAX refuses its environment (")
    assert "JAX_NUM_CPU_DEVICES" in done.stderr


def test_a_backend_of_matplotlib_that_is_not_there_is_named(scanned):
    done = command("report", scanned, MPLBACKEND="nosuch")
    assert done.returncode == 2
    assert done.stderr.startswith("scaling-jax: MPLBACKEND=nosuch (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("data", "prepare", "python"), ("status", "gs://bucket/folder")], ids=" ".join)
def test_a_cache_in_nobodys_home_is_named(command, refuses, monkeypatch):
    monkeypatch.setenv("SCALING_JAX_CACHE", "~nouser/x")
    refuses(*command, names="SCALING_JAX_CACHE=~nouser/x has no home")


def test_a_process_without_a_home_is_told_to_name_a_cache(monkeypatch):
    def nowhere(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SCALING_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UserError, match="set SCALING_JAX_CACHE"):
        cache_folder()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("localhost:{port}", 2, 2), "--process-id 2 with --num-processes 2"),
        (("localhost:{port}", 2, 7), "--process-id 7"),
        (("localhost:{port}", 2, -1), "--process-id -1"),
        (("localhost:{port}", 0, 0), "--num-processes 0"),
        (("localhost", 2, 0), "'localhost' must be host:port"),
        (("localhost:99999", 2, 1), "must be host:port"),
        (("localhost:0", 2, 0), "must be host:port"),
    ],
)
def test_a_process_that_cannot_be_is_refused_before_it_waits(given, names):
    address, *others = given
    began = time.monotonic()
    with pytest.raises(UserError, match=names):
        connect(address.format(port=free_port()), *others)
    assert time.monotonic() - began < 5
