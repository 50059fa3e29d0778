import io
from pathlib import Path

from rich.console import Console

from scaling_jax.console.tables import summary
from scaling_jax.results import analyse


def test_the_table_shows_three_losses_a_model_and_the_law(made_up):
    console = Console(width=140, record=True, file=io.StringIO())
    analysis = analyse(made_up[1])
    console.print(summary(analysis, [Path("results/x/figures") / name for name in ("a.png", "b.png")]))
    text = console.export_text()
    assert text.count("1x16") == text.count("1x32") == 3
    assert f"tokens · L^{analysis.fit.law.exponent:.2f}" in text
    assert "from all runs at once: B_crit = " in text
    assert [text.count(f"form {form}:") for form in ("loss", "above floor", "data", "size")] == [1, 1, 1, 1]
    assert "figures in results/x/figures: a.png, b.png" in text
