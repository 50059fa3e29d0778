"""Results that version 0.1.0 left.

version_0_1.tar.xz holds `small`, a scan of one model, five batch sizes and two seeds with measured branches, and
`trained`, what `train` left; without checkpoints, snapshots, logs, figures.
"""

import tarfile
from pathlib import Path

import pytest


@pytest.fixture
def old(tmp_path):
    """A copy of both folders."""
    with tarfile.open(Path(__file__).with_name("version_0_1.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path
