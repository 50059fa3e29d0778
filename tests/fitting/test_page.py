"""The code of docs/fitting.md, run as it stands there."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import scaling_jax as sj
from tests.fitting.planted import Planted
from tests.fitting.planted_budgets import SURFACES, PlantedBudgets

PAGE = Path(__file__).parents[2] / "docs" / "fitting.md"
BLOCKS = {
    re.match(r"# (\w+)", block).group(1): block
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
}
BATCHES = 256 * 2.0 ** np.arange(7)
LOSSES = np.geomspace(2.9, 1.8, 8)


def run(name, **yours):
    namespace = {"sj": sj} | yours
    exec(BLOCKS[name], namespace)
    return namespace


def test_a_trade_off():
    found = run("tradeoff", batch_tokens=BATCHES, steps=300 * (1 + 2_000 / BATCHES))
    assert found["tradeoff"].b_crit == pytest.approx(2_000)


def test_a_scan():
    columns = Planted(noise=0.01).columns(np.random.default_rng(0))
    del columns["run"]
    found = run("scan", **columns, sizes={"model0": 1e4, "model1": 1e5})
    assert found["law"].exponent == pytest.approx(-4.8, abs=0.1)
    assert found["joint"].law.exponent == pytest.approx(-4.8, abs=0.1)
    assert len(found["forms"]) == 4


def test_points():
    found = run("points", loss=LOSSES, b_crit=700 * (LOSSES - 1.4) ** -1.5, data_tokens=1e9 / LOSSES**6)
    assert found["with_floor"].floor == pytest.approx(1.4, abs=0.01)


def test_budgets():
    planted = PlantedBudgets(SURFACES["two arms"], rates=3, noise=1e-4)
    found = run("budgets", **planted.columns(np.random.default_rng(0)))
    assert found["fit"].law.exponent == pytest.approx(0.5, abs=0.05)
    assert set(found["steps"]) == {"model", "batch_tokens", "target_loss", "steps", "steps_tried"}


def test_published():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("published")
