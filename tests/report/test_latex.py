import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from scaling_jax.fitting import fit_scan
from scaling_jax.report.latex import _number, escaped, latex_table
from tests.fitting.planted import Planted


@pytest.fixture(scope="module")
def fit():
    return fit_scan(**Planted().columns(np.random.default_rng(0)), resamples=200)


def test_a_line_for_each_loss_with_the_numbers_of_the_fit(fit):
    lines = [line for line in latex_table(fit).splitlines() if line.startswith("model") and "interval" not in line]
    assert len(lines) == len(fit.points)
    for line, point in zip(lines, fit.points, strict=True):
        cells = [cell.strip(" \\$") for cell in line.split("&")]
        assert cells[0] == point.model
        assert float(cells[1]) == pytest.approx(point.loss, rel=1e-3)
        if point.shown:
            assert float(cells[2].replace(r"\,", "")) == pytest.approx(point.b_crit, rel=6e-3)
            low, high = (float(x) for x in re.findall(r"[\d.]+", cells[3].replace(r"\,", "")))
            assert (low, high) == pytest.approx(point.b_crit_interval, rel=6e-3)


@pytest.mark.parametrize(
    ("value", "said"),
    [(3_612.4, r"3\,610"), (1_234_567.0, r"1\,230\,000"), (99.96, "100"), (0.01234, "0.0123"), (math.inf, r"\infty")],
)
def test_numbers_have_three_digits(value, said):
    assert _number(value) == said


def test_names_are_no_commands():
    assert escaped(r"a_b & 50% {x} \input{y} ~^#$") == (
        r"a\_b \& 50\% \{x\} \textbackslash{}input\{y\} \textasciitilde{}\textasciicircum{}\#\$"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="LaTeX isn't installed")
def test_latex_sets_it(fit, tmp_path):
    page = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + latex_table(fit) + r"\end{document}"
    (tmp_path / "page.tex").write_text(page)
    subprocess.run(["pdflatex", "-halt-on-error", "page.tex"], cwd=tmp_path, check=True, capture_output=True)
