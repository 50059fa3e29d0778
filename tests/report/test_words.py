import math

import pytest

from scaling_jax.report.units import in_unit
from scaling_jax.report.words import duration, short


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (119, "119 s"), (120, "2 min"), (9_000, "2.5 h"), (864_000, "10 days")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_sentences_are_in_the_unit_of_the_task_and_losses_then_have_none():
    said = "Tokens: B_crit is 40 tokens at 2.0 nats per token (±0.05 nats), max_tokens = 5"
    assert in_unit(said, "images") == "Images: B_crit is 40 images at 2.0 (±0.05), max_tokens = 5"
    assert in_unit(said, "tokens") == said
