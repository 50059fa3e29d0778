import pytest

from scaling_jax.report.runs import read_runs
from scaling_jax.results import analyse


@pytest.fixture(scope="session")
def analysis(made_up):
    return analyse(made_up[1])


@pytest.fixture(scope="session")
def runs(made_up):
    return read_runs(*made_up)
