import csv
import math
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.advice.choices import Hardware
from scaling_jax.advice.horizon import advise_tokens, tokens_of
from scaling_jax.cli.main import main
from scaling_jax.fitting import published
from scaling_jax.io import UserError
from tests.fitting.planted_budgets import MONOTONE, SURFACES, PlantedBudgets

DEMO = Path("experiments/results/demo/measurements.csv")
PLANTED = PlantedBudgets(SURFACES["parabola"], rates=5, noise=1e-4)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write(tmp_path_factory.mktemp("budgets") / "mine.csv", PLANTED)


def write(path, planted):
    columns = planted.columns(np.random.default_rng(0))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def test_the_batch_for_a_budget_is_that_of_the_planted_law_and_its_rate_the_planted_one(table):
    advice = advise_tokens(table, 64e7, weight_decay=0.1, hardware=Hardware(2, 1e6))
    assert advice.quantity == "B_opt"
    assert advice.batch == pytest.approx(PLANTED.b_opt(64e7), rel=0.05)
    assert advice.interval[0] < PLANTED.b_opt(64e7) < advice.interval[1]
    assert advice.outside == pytest.approx(4.0)
    for row in advice.rows:
        assert row.steps == pytest.approx(64e7 / row.batch_tokens)
        assert row.seconds == pytest.approx(64e7 / 2e6)
        assert row.learning_rate == pytest.approx(1e-3 * math.sqrt(row.batch_tokens / 4096), rel=0.02)
        assert row.cost == pytest.approx(0.006 * math.log(row.batch_tokens / advice.batch) ** 2, abs=2e-3)
    # AdamW's timescale B/(ηλD), the same as that of the largest budget's best run
    timescales = [row.batch_tokens / (row.learning_rate * row.weight_decay * 64e7) for row in advice.rows]
    best = PLANTED.b_opt(16e7)
    assert timescales == pytest.approx([best / (1e-3 * math.sqrt(best / 4096) * 0.1 * 16e7)] * 5, rel=0.05)


def test_published_laws_of_the_same_quantity_stand_beside_it(table):
    advice = advise_tokens(table, 1e13)
    told = {law.key: law for law in advice.published}
    assert told["steplaw2025"].batch_tokens == pytest.approx(0.58 * 1e13**0.571)
    assert told["steplaw2025"].outside
    assert all(published[key].predicts == "B_opt" for key in told)
    assert not {law.key: law for law in advise_tokens(table, 2e10).published}["steplaw2025"].outside


def test_a_scan_answers_by_its_law_of_data_with_b_crit():
    advice = advise_tokens(DEMO, 1.5e6)
    assert advice.quantity == "B_crit"
    assert advice.interval[0] < advice.batch < advice.interval[1]
    assert advice.outside == 1.0
    assert {law.key for law in advice.published} == {"bergsma2025-crit"}
    losts = [row.cost for row in advice.rows]
    assert losts == sorted(losts)
    near = min(advice.rows, key=lambda row: abs(math.log(row.batch_tokens / advice.batch)))
    assert 0.3 < near.cost < 0.7


def test_what_no_law_can_answer_is_refused_with_what_is_missing(tmp_path, table):
    rising = write(tmp_path / "rising.csv", PlantedBudgets(MONOTONE["rising"]))
    with pytest.raises(UserError, match="no law B_opt"):
        advise_tokens(rising, 1e9)
    with pytest.raises(UserError, match="choose from m"):
        advise_tokens(table, 1e9, model="x")
    with pytest.raises(UserError, match="positive"):
        advise_tokens(table, 0)
    with pytest.raises(UserError, match="--params"):
        tokens_of(1e20, None)
    assert tokens_of(6e20, 1e9) == 1e11


def test_the_command_says_how_far_outside_and_takes_one_goal(table, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling-jax", "advise", str(table), "--tokens", "1e13"])
    main()
    said = " ".join(capsys.readouterr().out.split())
    assert "EXTRAPOLATED: 10T tokens are 62.5k times outside" in said
    assert "steplaw2025" in said
    monkeypatch.setattr("sys.argv", ["scaling-jax", "advise", str(table), "--tokens", "1e9", "--target-loss", "2"])
    with pytest.raises(SystemExit):
        main()
    assert "one of --target-loss, --tokens and --flops" in capsys.readouterr().err
