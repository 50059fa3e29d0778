from tests.robustness.conftest import cli

__all__ = ["cli"]
