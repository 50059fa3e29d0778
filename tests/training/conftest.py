import pytest

from tests.training import counting


@pytest.fixture(scope="session")
def corpus():
    """Text with something to learn: tokens count upwards, with jumps."""
    return counting.CORPUS
