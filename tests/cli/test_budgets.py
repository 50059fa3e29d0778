"""Commands given the folder of a budget scan, or of a single run."""

import json

import numpy as np

from scaling_jax.io.files import write_rows
from scaling_jax.scanning import BudgetScan, BudgetSubject, LearningRates, powers_of_two
from scaling_jax.scanning.annealing import AnnealedLoss
from scaling_jax.scanning.budget_records import write_budget_scan
from scaling_jax.tasks import ModelConfig
from tests.advice.test_live_run import growing, write
from tests.fitting.planted_budgets import SURFACES, PlantedBudgets
from tests.robustness.conftest import refuses

__all__ = ["refuses"]
SCAN = BudgetScan(
    name="mine",
    subjects=(BudgetSubject(ModelConfig(1, 16, 1), (20_480, 40_960), LearningRates(1e-2, 256)),),
    batch_tokens=powers_of_two(128, 1_024),
)


def write_folder(folder):
    folder.mkdir()
    write_budget_scan(folder, SCAN)
    return folder


def write_table(folder):
    columns = PlantedBudgets(SURFACES["parabola"], rates=3, noise=1e-4).columns(np.random.default_rng(0))
    names = [name for name in AnnealedLoss._fields if name in columns]
    rows = zip(*(columns[name] for name in names), strict=True)
    table = [AnnealedLoss(**dict(zip(names, row, strict=True)), seed=0) for row in rows]
    write_rows(folder / "annealed.csv", AnnealedLoss, table)


def test_a_budget_scans_folder_stands_for_its_table_once_it_is_finished(cli, refuses, tmp_path):
    folder = write_folder(tmp_path / "mine")
    refuses("fit", folder, names="isn't finished", watched=[folder])
    refuses("advise", folder, "--tokens", "1e9", names="isn't finished", watched=[folder])
    write_table(folder)
    assert cli("fit", folder).code == 0
    fit = json.loads((folder / "annealed.fit.json").read_text())
    said = " ".join(cli("advise", folder, "--tokens", "1e9", "--json").output.split())
    assert json.loads(said)["quantity"] == "B_opt"
    assert fit["budget_law"]["exponent"] > 0
    for command in (["report", folder], ["branch", folder, "--batch-tokens", "128"], ["compare", folder, folder]):
        refuses(*command, names=f"scaling-jax fit {folder}", watched=[folder])


def test_a_budget_scan_is_refused_what_it_has_not(refuses, tmp_path):
    folder = write_folder(tmp_path / "mine")
    scan = folder / "budget_scan.json"
    refuses("scan", scan, "--command", "x {batch}", names="leave out --command")
    refuses("scan", scan, "--executor", "ray", names="--executor")
    refuses("scan", scan, "--set", "horizons=1", names="no 'horizons'")
    refuses("branch", folder, "--batch-tokens", "128", "--experiment", scan, names="budget scan")
    scan.write_text(scan.read_text().replace('"mine"', '"yours"'))
    refuses("scan", scan, names="sha256")
    refuses("status", folder, names="damaged")


def test_a_single_runs_folder_gives_advice_for_tokens(cli, refuses, tmp_path):
    write(tmp_path / "one" / "runs" / "a", growing, spread=1e-3)
    said = cli("advise", tmp_path / "one", "--tokens", "1e9", "--json")
    assert json.loads(said.output)["quantity"] == "B_crit"
    table = " ".join(cli("advise", tmp_path / "one", "--tokens", "1e9").output.split())
    for part in ("EXTRAPOLATED", "bergsma2025-crit", "0.47", "note: the noise scale is tr(Σ)/|G|²"):
        assert part in table
