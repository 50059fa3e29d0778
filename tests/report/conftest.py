import pytest

from scaling_jax.results import analyse


@pytest.fixture(scope="session")
def analysis(made_up):
    return analyse(made_up[1])


@pytest.fixture(scope="session")
def runs(analysis):
    return analysis.results.cells
