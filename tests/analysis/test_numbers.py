import math

import pytest

from scaling_jax.analysis.numbers import short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12.34, "12.3"),
        (999, "999"),
        (999.7, "1k"),
        (1_840, "1.84k"),
        (2.1e8, "210M"),
        (4e9, "4G"),
        (math.inf, "∞"),
        (math.nan, "unresolved"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text
