import csv
import json

import numpy as np
import pytest

from scaling_jax.cli.main import main
from scaling_jax.io import UserError
from scaling_jax.results.budget_table import fit_budget_table, is_budget_table, read_budget_table, write_budget_fit
from tests.fitting.planted_budgets import MONOTONE, SURFACES, PlantedBudgets

HEADER = "model,batch_tokens,tokens,loss"
ROWS = [f"m,{256 * 2**k},1e7,{2 + 0.01 * (k - 2) ** 2:.4f}" for k in range(5)]


def write(path, rows=ROWS, header=HEADER):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def planted(path, surface=SURFACES["two arms"], **options):
    columns = PlantedBudgets(surface, **options).columns(np.random.default_rng(0))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def test_a_table_of_budgets_is_told_from_a_table_of_steps(tmp_path):
    assert is_budget_table(write(tmp_path / "a.csv"))
    assert is_budget_table(write(tmp_path / "b.csv", header="﻿Model, batch_tokens ,TOKENS,loss"))
    assert not is_budget_table(write(tmp_path / "c.csv", header="model,batch_tokens,steps,loss"))
    assert not is_budget_table(write(tmp_path / "d.csv", header="model,batch_tokens,tokens,loss,steps"))


def test_the_fit_of_a_table_lies_beside_it_and_is_the_same_each_time(tmp_path):
    path = planted(tmp_path / "mine.csv", rates=3)
    written = write_budget_fit(fit_budget_table(path, "1%"))
    found = json.loads(written.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert written.name == "mine.fit.json"
    assert found["budget_law"]["exponent_interval"][0] < 0.5 < found["budget_law"]["exponent_interval"][1]
    assert len(found["budgets"]) == 5
    assert found["budgets"][0]["penalty"] == pytest.approx(0.01 * found["budgets"][0]["loss"])
    assert found["measurements"] == "mine.csv"
    before = written.read_bytes()
    assert write_budget_fit(fit_budget_table(path, "1%")).read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        ([*ROWS, "m,8192,1e3,2.0"], HEADER, "line 7, column tokens: 1000 tokens are fewer"),
        ([*ROWS, "m,256,1e7,2.0"], HEADER, "line 7.*also on line 2.*column seed"),
        ([*ROWS, "m,8192,1e7,40"], HEADER, "line 7, column loss is 40.*perplexity"),
        ([*ROWS, "m,8192,1e7,-2"], HEADER, "line 7, column loss is -2.*positive"),
        ([*ROWS, "m,8192,1e7"], HEADER, "line 7: 3 cells under 4 columns"),
        ([*ROWS, ",8192,1e7,2"], HEADER, "line 7, column model is empty"),
        (["m,4,1e7,2", "m,8,1e7,2"], HEADER, "column batch_tokens: the largest batch.*sequences"),
        (["m,256,1e7,"], HEADER, "column loss: every run diverged"),
        (ROWS, "model,batch,tokens,loss", "line 1: no column batch_tokens"),
        (["m,256,1e7,2,1e-3", "m,256,1e7,2,"], f"{HEADER},learning_rate", "line 3, column learning_rate.*on line 2"),
        ([], HEADER, "no rows"),
    ],
)
def test_mistakes_are_named_by_line_and_column(tmp_path, rows, header, said):
    with pytest.raises(UserError, match=said):
        read_budget_table(write(tmp_path / "a.csv", rows, header))


@pytest.mark.parametrize("penalty", ["-1", "nan", "x%", "0"])
def test_a_penalty_that_is_none_is_refused(tmp_path, penalty):
    with pytest.raises(UserError, match="must be positive"):
        fit_budget_table(write(tmp_path / "a.csv"), penalty)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["scaling-jax", *map(str, arguments)])
    main()


def test_the_command_prints_the_law_and_writes_figures_with_their_data(tmp_path, monkeypatch, capsys):
    path = planted(tmp_path / "mine.csv")
    run(monkeypatch, "fit", path)
    said = " ".join(capsys.readouterr().out.split())
    assert "B_opt" in said
    assert "there B_crit isn't defined" in said
    assert {p.name for p in (tmp_path / "mine.figures").iterdir()} == {
        f"{name}.{kind}" for name in ("budget_losses", "best_batch") for kind in ("png", "svg", "csv")
    }
    rows = list(csv.DictReader((tmp_path / "mine.figures" / "best_batch.csv").read_text().splitlines()))
    assert len(rows) == 5
    assert float(rows[0]["low"]) < float(rows[0]["y"]) < float(rows[0]["high"])


def test_to_steps_says_that_steps_are_interpolated_and_finds_no_law_where_tokens_are_u_shaped(
    tmp_path, monkeypatch, capsys
):
    path = planted(tmp_path / "mine.csv")
    run(monkeypatch, "fit", path, "--to-steps")
    said = " ".join(capsys.readouterr().out.split())
    assert "interpolated between the losses of whole runs" in said
    assert "tokens are U-shaped" in said
    assert "No law" in said
    assert (tmp_path / "mine.steps.fit.json").exists()


def test_flags_that_dont_fit_the_table_are_refused(tmp_path, monkeypatch, capsys):
    budgets = planted(tmp_path / "mine.csv", MONOTONE["rising"])
    steps = write(tmp_path / "steps.csv", header="model,batch_tokens,steps,loss")
    for table, *flags in (
        (budgets, "--above-minimum"),
        (budgets, "--to-steps", "--penalty", "1%"),
        (steps, "--to-steps"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, "fit", table, *flags)
        assert flags[0] in capsys.readouterr().err


def test_batches_in_sequences_are_named_by_a_line_of_their_own_model(tmp_path):
    path = tmp_path / "mine.csv"
    rows = [("a", 32), ("a", 64), ("b", 32), ("b", 48)]
    path.write_text("model,batch_tokens,tokens,loss\n" + "".join(f"{name},{batch},1000,3\n" for name, batch in rows))
    with pytest.raises(UserError, match=r"line 5, column batch_tokens: the largest batch of model b is 48 tokens"):
        read_budget_table(path)
    path.write_text("model,batch_tokens,tokens,loss\na,64,1e6,3\na,128,1e6,3\nb,64,1e6,3\nb,4096,1e6,3\n")
    with pytest.raises(UserError, match=r"line 4, column batch_tokens: model b has batches of 64"):
        read_budget_table(path)
