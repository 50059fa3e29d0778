import io

from rich.console import Console

from scaling_jax.console.tables import print_fit
from scaling_jax.results.table import fit_table
from tests.results.test_table import planted


def printed(path):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(print_fit(fit_table(path), path.parent / "fit.json"))
    return console.export_text()


def test_one_sided_points_are_printed_without_numbers(tmp_path):
    text = printed(planted(tmp_path / "a.csv", b_crit_middle=1e8))
    assert text.count("one-sided") == 28
    assert "No law" in text


def test_both_laws_and_every_form_are_printed_with_their_ranges(tmp_path):
    text = printed(planted(tmp_path / "a.csv"))
    assert "for losses 2.9 to 1.75 (nats per token), outside of which it is untested" in text
    assert "from all runs at once: B_crit = " in text
    for form, variable in (("loss", "loss"), ("above floor", "loss"), ("data", "D_min"), ("size", "N")):
        assert f"form {form}: " in text
        assert f"x = {variable} in " in text
