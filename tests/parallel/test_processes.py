"""How a process finds the others of its run, or sees that it is alone."""

import pytest

from scaling_jax.io import UserError
from scaling_jax.parallel import processes
from tests.training.test_processes import free_port


def test_only_some_of_the_flags_are_refused():
    with pytest.raises(UserError, match="--coordinator, --process-id missing"):
        processes.connect(num_processes=2)


def test_a_coordinator_that_nobody_started_is_named(monkeypatch):
    monkeypatch.setattr(processes, "_CONNECT_SECONDS", 0.1)
    address = f"localhost:{free_port()}"
    with pytest.raises(UserError, match=f"nothing listens at {address}"):
        processes.connect(address, 2, 1)


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "8"}])
def test_a_process_on_its_own_joins_nothing(monkeypatch, environment):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize if not environment else pytest.fail)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.connect()
    assert processes.is_first()
    assert processes.agree(True, False) == (True, False)
    assert processes.from_first({"step": 3}) == {"step": 3}


@pytest.mark.parametrize(("tasks", "local_device_ids"), [("1(x4)", []), ("1", []), ("8(x2)", None), ("1,2", None)])
def test_a_process_alone_on_its_machine_takes_all_of_its_gpus(monkeypatch, tasks, local_device_ids):
    """JAX would give it one of them."""
    asked = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **settings: asked.update(settings))
    monkeypatch.setattr("atexit.register", lambda withdraw: withdraw())
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    processes.connect()
    assert asked["local_device_ids"] == local_device_ids
