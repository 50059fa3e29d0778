import io
from pathlib import Path

from rich.console import Console

from scaling_jax.console.tables import summary
from scaling_jax.report.words import short
from scaling_jax.results import analyse


def test_the_table_shows_three_losses_a_model_and_the_law(made_up):
    console = Console(width=140, record=True, file=io.StringIO())
    analysis = analyse(made_up[1])
    console.print(summary(analysis, [Path("results/x/figures") / name for name in ("a.png", "b.png")]))
    text = console.export_text()
    assert text.count("│ 1x16") == text.count("│ 1x32") == 3
    for law in (analysis.fit.law, analysis.joint.law):
        assert f"{short(law.b_star)} tokens · L^{law.exponent:.2f}" in text
    for form in analysis.forms:
        assert [
            line for line in text.splitlines() if form.form in line and f"{100 * form.held_out_error:.1f} %" in line
        ]
    (figures,) = [line for line in text.splitlines() if "results/x/figures" in line]
    assert "a.png" in figures
    assert "b.png" in figures
