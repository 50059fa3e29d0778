import os
import subprocess
import sys

import pytest

from scaling_jax.parallel import devices


@pytest.mark.parametrize(
    ("cores", "batches", "expected"),
    [(2, [32], 2), (2, [32, 33], None), (4, [6, 12], 3), (4, [6, 8], None), (1, [8], None), (64, [64], None)],
)
def test_a_device_a_core_as_far_as_they_divide_every_batch(monkeypatch, cores, batches, expected):
    monkeypatch.setattr(devices, "available_cores", lambda: range(cores))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    devices.share_cores(batches)
    added = (
        ""
        if expected is None
        else (f" --xla_force_host_platform_device_count={expected} --xla_cpu_multi_thread_eigen=false")
    )
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=0" + added


def test_flags_of_the_users_own_win(monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: range(2))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    devices.share_cores([8])
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"


def test_jax_takes_them_after_it_was_imported():
    code = (
        "import jax; from scaling_jax.parallel import devices; devices.available_cores = lambda: range(3); "
        "devices.share_cores([6]); print(jax.device_count())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]
