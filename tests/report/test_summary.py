import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from scaling_jax.analysis import analyse
from scaling_jax.report.summary import summary, tokens


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.34, "12.3"), (999, "999"), (1_840, "1.84k"), (2.1e8, "210M"), (math.inf, "∞"), (math.nan, "unresolved")],
)
def test_tokens_are_short(value, text):
    assert tokens(value) == text


def test_the_table_shows_three_losses_a_model_and_the_law(made_up):
    console = Console(width=140, record=True, file=io.StringIO())
    analysis = analyse(made_up[1])
    console.print(summary(analysis, ["a.png", "b.png"], Path("results/x/figures")))
    text = console.export_text()
    assert text.count("1x16") == text.count("1x32") == 3
    assert f"tokens · L^{analysis.fit.law.exponent:.2f}" in text
    assert "figures in results/x/figures: a.png, b.png" in text
