"""A budget scan from its experiment to its table, with made-up losses, and once with real runs that are killed."""

import dataclasses
import io
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from scaling_jax.console.budget_scan import budget_plan_table, budget_scan_on_console
from scaling_jax.fitting import fit_budget
from scaling_jax.io import UserError
from scaling_jax.io.config import with_overrides
from scaling_jax.results.budget_table import read_budget_table
from scaling_jax.results.status import read_status
from scaling_jax.scanning import (
    BudgetScan,
    BudgetSubject,
    LearningRates,
    budget_plan,
    budget_runs,
    powers_of_two,
    scan_budgets,
)
from scaling_jax.scanning.annealing import finished_losses, log_horizons
from scaling_jax.scanning.budget_plan import plan_budget_scan
from scaling_jax.scanning.budget_records import read_budget_scan
from scaling_jax.scanning.plan import CellPlan, ScanPlan
from scaling_jax.scanning.records import load_plan, load_scan
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Interrupted
from tests.made_up_scan import evaluated_lines, write_run
from tests.training.counting import CORPUS

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
SUBJECT = BudgetSubject(MODEL, (20_480, 40_960, 81_920, 163_840), LearningRates(1e-2, 256, places=2))
SCAN = BudgetScan(name="made-up", subjects=(SUBJECT,), batch_tokens=powers_of_two(128, 2_048))
SMALL = dataclasses.replace(
    SCAN, batch_tokens=powers_of_two(128, 1_024), subjects=(dataclasses.replace(SUBJECT, horizons=(20_480, 81_920)),)
)


def loss_of(run, horizon):
    """A surface with B_opt = 0.02·D^0.8, and the best rate 0.02·√(B/1024)."""
    off_batch = math.log(run.batch_tokens / (0.02 * horizon**0.8))
    off_rate = math.log(run.learning_rate / (0.02 * math.sqrt(run.batch_tokens / 1_024)))
    return 2 + 3_000 / horizon + 0.01 * off_batch**2 + 0.02 * off_rate**2


class Trainer:
    """Writes the records of a trunk and its decays; stops after some runs."""

    def __init__(self, runs=math.inf):
        self.left, self.trained = runs, []

    def __call__(self, plan, workdir, **_):
        for run, horizon in ((plan.trunk, None), *zip(plan.annealed, plan.horizons, strict=True)):
            if (workdir / "runs" / run.run_id / "result.json").exists():
                continue
            if self.left < 1:
                raise Interrupted
            self.left -= 1
            self.trained.append(run)
            steps = run.max_tokens // run.batch_tokens
            write_run(workdir, run, evaluated_lines(run, [(steps, loss_of(run, horizon or 1e6))]), "exhausted")
        return finished_losses(plan, workdir)


@pytest.fixture
def trained(monkeypatch):
    """Trains a scan in this process with made-up losses: (scan, folder, runs) -> its trainer."""
    monkeypatch.setattr(budget_runs, "source_of", lambda scan: (None, False))
    monkeypatch.setattr(budget_runs, "data_of", lambda run: CORPUS)
    monkeypatch.setattr(budget_runs, "check_same_text", lambda *_: None)

    def train(scan, folder, runs=math.inf, **events):
        trainer = Trainer(runs)
        monkeypatch.setattr(budget_runs, "train_annealed", trainer)
        scan_budgets(scan, folder, **events)
        return trainer

    return train


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_the_table_gives_the_planted_best_batches(trained, tmp_path):
    rates = []
    trained(SCAN, tmp_path, on_rate=rates.append)
    table = read_budget_table(tmp_path / "annealed.csv")
    assert len(rates) == len(set(zip(table.batch_tokens, table.learning_rate, strict=True)))
    fit = fit_budget(**table.columns)
    at = {budget.tokens: budget for budget in fit.budgets}
    assert at.keys() == set(SUBJECT.horizons)
    assert at[81_920].b_opt == pytest.approx(0.02 * 81_920**0.8, rel=0.05)
    assert not any(budget.runs.at_edge.any() for budget in fit.budgets)
    assert at[81_920].rate_at(512) == pytest.approx(0.02 * math.sqrt(0.5), rel=0.02)


def test_a_scan_that_is_stopped_again_and_again_gives_the_same_files(trained, tmp_path):
    whole = trained(SMALL, tmp_path / "whole").trained
    runs = []
    for _ in range(200):
        try:
            runs += trained(SMALL, tmp_path / "parts", runs=15).trained
            break
        except Interrupted:
            assert not (tmp_path / "parts" / "annealed.csv").exists()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert trained(SMALL, tmp_path / "whole").trained == []  # and is finished
    assert len({run.run_id for run in whole}) == len(whole)


def test_the_table_holds_runs_that_diverged_without_a_loss(trained, tmp_path, monkeypatch):
    def diverges(plan, workdir, **_):
        run = plan.trunk
        if run.learning_rate < 0.015:
            return Trainer()(plan, workdir)
        write_run(workdir, run, evaluated_lines(run, [(10, None)]), "diverged")
        return []

    trained(SMALL, tmp_path / "other")  # sets up the rest
    monkeypatch.setattr(budget_runs, "train_annealed", diverges)
    table = read_budget_table(scan_budgets(SMALL, tmp_path / "scan"))
    lost = [math.isnan(loss) for loss in table.loss]
    assert lost == [rate >= 0.015 for rate in table.learning_rate]
    assert any(lost)


def test_a_scan_grows_by_batch_sizes_and_is_found_as_it_was_written(trained, tmp_path):
    few = dataclasses.replace(SMALL, batch_tokens=(64, 128, 256, 512))
    before = trained(few, tmp_path).trained
    assert read_budget_scan(tmp_path) == few
    more = dataclasses.replace(SMALL, seeds=(0, 1), batch_tokens=powers_of_two(128, 1_024))
    new = trained(more, tmp_path).trained
    assert read_budget_scan(tmp_path) == more
    assert not {run.run_id for run in before} & {run.run_id for run in new}
    for other in (dataclasses.replace(SMALL, decay_share=0.2), dataclasses.replace(SMALL, eval_tokens=32)):
        with pytest.raises(UserError, match=r"another budget scan \((decay_share|eval_tokens) = .*--results"):
            scan_budgets(other, tmp_path)


def test_status_says_how_many_rates_a_batch_size_has(trained, tmp_path):
    with pytest.raises(Interrupted):
        trained(SCAN, tmp_path, runs=13)
    status = read_status(tmp_path)
    assert [part.state for part in status.parts] == ["not begun"] * 2 + ["interrupted"] + ["not begun"] * 2
    assert status.parts[2].rates_tried == 3
    assert 0 < status.fraction < 0.2
    trained(SCAN, tmp_path)
    assert {part.state for part in read_status(tmp_path).parts} == {"done"}
    assert read_status(tmp_path).fraction == 1.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["batch_tokens=[128,256,512]"], "at least 4 batch sizes"),
        (
            ["subjects.0.horizons=[20000,40960]"],
            "20,000 tokens aren't a whole number of batches of 128 tokens: use 19,968",
        ),
        (["subjects.0.horizons=[2048]"], "less than 2 steps of 128 tokens: use longer horizons or smaller batches"),
        (["subjects.0.horizons=[40960,20480]"], "that rise"),
        (["decay_share=0"], "decay_share"),
        (["decay_form=slow"], "linear, sqrt, cosine"),
        (["subjects.0.learning_rates.together=2"], "together"),
        (["name=a/b"], "valid name"),
        (["batch_tokens=[40,256,512,1024]"], "whole sequences of 16 tokens"),
    ],
)
def test_a_scan_that_cannot_be_is_refused_in_a_line(changes, says):
    with pytest.raises(UserError, match=says):
        with_overrides(SCAN, changes)


def test_large_batches_have_only_the_horizons_that_leave_them_a_decay():
    assert SCAN.horizons(SCAN.cells[0]) == SUBJECT.horizons
    assert SCAN.horizons(SCAN.cells[-1]) == (40_960, 81_920, 163_840)
    assert SCAN.plan(SCAN.cells[-1], 0).horizons[0] * SCAN.decay_share / 2_048 >= 2


def test_an_experiment_file_may_define_a_budget_scan():
    path = Path(__file__).parents[2] / "experiments" / "horizon.py"
    assert load_scan(path).subjects[0].horizons == log_horizons(2**17, 2**20, 1, largest_batch=16_384)
    trunks = load_plan(path)
    assert [run.batch_tokens for run in trunks.values()] == list(powers_of_two(256, 16_384))


def test_a_plan_counts_trunks_decays_and_what_is_done(trained, tmp_path, monkeypatch):
    """With a step that takes 1 ms for each token, on two workers."""
    cells = SCAN.to_a_loss().cells
    parts = [CellPlan(cell, 3, 8, 1_000, 1e6, 2**20, most_seconds=1.0) for cell in cells]
    steps = ScanPlan(tuple(parts), 0, 2, 2**30, 1e9, timed=("1x16",))
    monkeypatch.setattr(budget_plan, "plan_scan", lambda *_: steps)
    monkeypatch.setattr(budget_plan, "available_cores", lambda: [0, 1])
    plan = plan_budget_scan(SCAN, tmp_path)
    first, last = plan.cells[0], plan.cells[-1]
    assert (first.runs, last.runs) == (5, 4)
    whole = SCAN.plan(SCAN.cells[0], 0)
    assert first.tokens == whole.num_tokens
    assert first.trunk_tokens == pytest.approx(0.9 * 163_840, rel=0.01)
    assert first.decay_tokens == pytest.approx(0.1 * sum(SUBJECT.horizons), rel=0.03)
    assert plan.usual_tokens == sum(4 * cell.tokens for cell in plan.cells)
    trained_for = [cell.tokens * 1e-3 for cell in plan.cells]
    assert plan.usual_seconds > 4 * sum(trained_for) / 2
    assert plan.usual_seconds < 4 * (sum(trained_for) + sum(c.eval_tokens for c in plan.cells) * 1e-3 + 5 * 5) / 2
    assert plan.most_seconds == pytest.approx(2 * plan.usual_seconds)
    shown = Console(width=100, record=True, file=io.StringIO())
    shown.print(budget_plan_table(plan))
    text = shown.export_text()
    assert "5 batch sizes to train, 0 done; 15 to 40 learning rates, usually about 20; 2 at a time" in text
    with pytest.raises(Interrupted):
        trained(SCAN, tmp_path, runs=13)
    assert sum(cell.tried for cell in plan_budget_scan(SCAN, tmp_path).cells) == 2
    trained(SCAN, tmp_path)
    done = plan_budget_scan(SCAN, tmp_path)
    assert (done.cells_done, done.usual_tokens, done.usual_seconds) == (5, 0, 0.0)


def test_the_console_says_a_line_for_each_learning_rate(trained, tmp_path, capsys):
    trainer = trained(SMALL, tmp_path / "other")
    budget_scan_on_console(SMALL, tmp_path / "scan")
    lines = capsys.readouterr().out.splitlines()
    trunks = {run.run_id for run in trainer.trained if run.schedule is None}
    assert len(lines) == 1 + len(trunks)
    assert "1x16 · 512 tokens, lr 0.00816: " in lines[1]
    assert "4 of 4 batch sizes done, about 0:00 left" in lines[-1]


FILE = """
from scaling_jax import BudgetScan, BudgetSubject, LearningRates
from scaling_jax.tasks import ModelConfig

EXPERIMENT = BudgetScan(
    name="tiny",
    subjects=(
        BudgetSubject(ModelConfig(1, 16, 1, context=16), (10_240, 20_480), LearningRates(2e-2, 256, most=2)),
    ),
    batch_tokens=(64, 128, 256, 512),
    text="files:FOLDER/*.txt",
    eval_tokens=512,
)
"""


@pytest.mark.long
def test_a_scan_that_was_killed_gives_the_same_table_and_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "cache"))
    for k in range(40):
        (tmp_path / f"{k}.txt").write_text("".join(chr(97 + (k * j * j) % 23) for j in range(4_000)))
    (tmp_path / "tiny.py").write_text(FILE.replace("FOLDER", str(tmp_path)))

    def scan(results):
        words = ["scan", tmp_path / "tiny.py", "--results", tmp_path / results]
        return subprocess.Popen([sys.executable, "-m", "scaling_jax.cli.main", *words], stdout=subprocess.DEVNULL)

    killed = scan("killed")
    until = time.time() + 100
    while len(list(tmp_path.glob("killed/runs/*/result.json"))) < 4 and time.time() < until:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "annealed.csv").exists()
    assert scan("killed").wait(timeout=100) == 0
    assert scan("whole").wait(timeout=100) == 0
    names = ("annealed.csv", "annealed.fit.json", "budget_scan.json", "runs/*/config.json", "runs/*/metrics.jsonl")
    files = [p.relative_to(tmp_path / "whole") for name in names for p in (tmp_path / "whole").glob(name)]
    assert len(files) > 40
    for file in files:
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
