"""No table loses a cell on a narrow terminal."""

import dataclasses
import io
import math
import re
from types import SimpleNamespace

import pytest
from rich.console import Console, Group

from scaling_jax.advice.advise import advise
from scaling_jax.compile.ahead_of_time import CompiledBatch, Executable
from scaling_jax.console.advice import advice_table
from scaling_jax.console.grid import Grid
from scaling_jax.console.scan_display import ScanDisplay
from scaling_jax.console.tables import _compiled_table, plan_table, print_fit, status_table, summary
from scaling_jax.results.status import PartStatus, Status
from scaling_jax.results.table import fit_table
from scaling_jax.scanning.plan import ScanPlan, plan_cell
from scaling_jax.training.program import program_for
from tests.console.test_live import progress

WIDTHS = (60, 80, 120)


def printed(shown, width):
    console = Console(width=width, file=io.StringIO())
    console.print(shown, highlight=False)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def grids(made_up, tmp_path_factory):
    """{name: every table of the command line}."""
    folder = tmp_path_factory.mktemp("tables")
    batches, losses = (128, 512, 2_048, 8_192, 32_768), (3.0, 2.7, 2.4)
    fits = {}
    for name, a in (("a", 1.0), ("12x768-new optimizer", 0.5)):  # the second is no hyperbola
        rows = [
            f"{name},{b},{x},{300 * (3 / x) ** 6 * (1 + (1e5 * x**-4.8 / b) ** a):.6g}" for b in batches for x in losses
        ]
        (folder / f"{a}.csv").write_text("\n".join(["model,batch_tokens,target_loss,steps", *rows, ""]))
        fits[name] = fit_table(folder / f"{a}.csv", laws=False)
    straight, bent = fits.values()
    scan = SimpleNamespace(fit=bent.fit, joint=None, forms=(), notes=(), noise=[], noise_ratio=math.nan)
    experiment = made_up[0]
    part = PartStatus("12x768 · 1,048,576 tokens", "interrupted", 3, 1.23e-4, 1_234_567, 12.345, 1_234_567.0, 3.6e5)
    status = Status("scan", "batch sizes", True, [part, part._replace(state="done")], 0.5, 100.0)
    plan = ScanPlan(tuple(plan_cell(experiment, cell, 0, 1) for cell in experiment.cells), 0, 2, 1 << 32, 1e9)
    program = program_for(experiment.run(experiment.cells[-1], 0))
    executable = Executable(3 << 30, True, 1e15, ())
    batch = CompiledBatch(program, "v5e:4x4", (), executable, executable, executable, 1.23e15, 2e15)
    display = ScanDisplay(experiment, Console(file=io.StringIO()))
    display.on_event(progress(experiment.cells[-1], step=1_234_567))
    return {
        "fit": print_fit(straight, folder),
        "fit of free shapes": print_fit(bent, folder),
        "summary": summary(scan),
        "plan": plan_table(plan),
        "status": status_table(status),
        "advice": advice_table(advise(folder / "1.0.csv", 2.5)),
        "compiled": Group(_compiled_table([batch])),
        "live": display._render(),
    }


NAMES = ("fit", "fit of free shapes", "summary", "plan", "status", "advice", "compiled", "live")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_of_every_table_is_shown_whole(name, width, grids):
    shown = grids[name]
    text = printed(shown, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text.replace("about … left", "")
    (grid,) = [part for part in shown.renderables if isinstance(part, Grid)]
    words = re.split(r"[\s│|]+", text)
    for row in grid.rows:
        for cell in row:
            for word in cell.split():
                assert any(word in there for there in words), (cell, text)
    for k, heading in enumerate(grid.columns):
        if any(k < len(row) and row[k] for row in grid.rows):  # paragraphs leave empty columns out
            assert all(word in text for word in heading.split())


@pytest.mark.parametrize(("width", "lines", "border"), [(40, 4, True), (20, 3, False), (12, 5, False)])
def test_a_table_gives_up_its_borders_first_and_then_its_columns(width, lines, border):
    grid = Grid(("model", "loss", "steps"), [("1x32", "2.5", "1,000"), ("2x64", "", "20")], words=("model",))
    text = printed(grid, width)
    assert ("│" in text) == border
    if width == 12:
        assert "model 1x32:" in text
        assert "loss" in text.split("2x64")[0]
        assert "loss" not in text.split("2x64")[1]


def test_a_table_may_have_rows_of_different_colours():
    grid = Grid(("a",), [("1",), ("2",)], styles=["red", None])
    assert dataclasses.replace(grid, bordered=False)._styles() == ["red", None]
