from pathlib import Path

import numpy as np
import pytest

from scaling_jax.advice import best_rates
from scaling_jax.io import UserError
from scaling_jax.results.table import read_table

HEADER = "model,batch_tokens,target_loss,steps,seed,learning_rate,tuned"
ROWS = """
m,256,2.5,900,0,1e-3,True
m,256,2.0,2000,0,2e-3,True
m,1024,2.5,400,0,2e-3,True
m,1024,2.5,400,1,8e-3,True
m,1024,2.0,900,0,4e-3,True
m,4096,2.5,200,0,6e-3,True
m,4096,2.0,500,0,8e-3,False
m,8192,2.0,,0,9,True
other,256,2.0,400,0,,
other,512,2.0,300,0,,
other,1024,2.0,200,0,,
"""


@pytest.fixture
def table(tmp_path):
    path = Path(tmp_path) / "rates.csv"
    path.write_text(HEADER + ROWS)
    return read_table(path)


def test_rates_are_tuned_at_tested_batches_and_between_them_interpolated(table):
    rates = best_rates(table, "m", 2.0)
    assert rates.at(1_024) == (pytest.approx(4e-3), "tuned")
    assert rates.at(4_096) == (pytest.approx(8e-3), "edge")
    assert rates.at(512) == (pytest.approx(8e-6**0.5), "between")


def test_beyond_tested_batches_rates_go_as_the_root_of_the_nearest(table):
    rates = best_rates(table, "m", 2.0)
    assert rates.at(64) == (pytest.approx(1e-3), "rule")
    assert rates.at(4 * 4_096) == (pytest.approx(16e-3), "rule")  # 8,192 tokens didn't reach the loss


def test_between_losses_rates_are_interpolated_and_seeds_averaged(table):
    assert best_rates(table, "m", 2.5).at(1_024).learning_rate == pytest.approx(4e-3)  # of 2e-3 and 8e-3
    halfway = np.sqrt(2.0 * 2.5)
    assert best_rates(table, "m", halfway).at(256).learning_rate == pytest.approx(2e-6**0.5)
    assert best_rates(table, "m", 1.5).at(256).learning_rate == pytest.approx(2e-3)


def test_a_table_without_rates_has_none(table):
    assert best_rates(table, "other", 2.0) is None


@pytest.mark.parametrize("cell", ["fast", "-1", "0"])
def test_a_rate_that_cannot_be_is_named(cell, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(HEADER + ROWS.replace("1e-3", cell, 1))
    with pytest.raises(UserError, match=f"line 2, column learning_rate is .?{cell}"):
        read_table(path)
