"""Kills and signals at random moments change no byte of what a scan or a run ends with."""

import pytest

from tests.robustness.soak import COMPARED, soak


@pytest.mark.long
def test_thirty_kills_change_no_byte(tmp_path):
    soak(tmp_path, list(COMPARED), kills=30, seed=1)
