import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from scaling_jax.advice.advise import advise
from scaling_jax.io import UserError
from scaling_jax.results import analyse, noise_ratios
from scaling_jax.results.results import check_measurements
from tests.made_up_scan import EXPONENT, b_crit


@pytest.fixture(scope="module")
def analysis(made_up):
    return analyse(made_up[1])


def test_the_whole_way_from_runs_to_law_recovers_the_truth(analysis):
    for point in analysis.fit.points:
        assert point.tradeoff.b_crit == pytest.approx(b_crit(point.loss), rel=0.05)
    assert analysis.fit.law.exponent == pytest.approx(EXPONENT, abs=0.05)


def test_noise_scales_come_out_in_tokens_at_their_loss(analysis):
    assert len(analysis.noise) > 80
    for measured in analysis.noise:
        assert measured.resolved
        assert measured.b_simple == pytest.approx(b_crit(measured.loss), rel=0.1)
    # The made-up noise scale is B_crit from the start. With S_min ∝ L^-6, the local one is 1 + 5/6 times that.
    assert analysis.noise_ratio == pytest.approx(1 / (1 - EXPONENT / 6), abs=0.03)


def test_learning_rates_inside_the_grid_are_tuned(analysis):
    assert all(m.tuned for m in analysis.measurements)
    # The made-up moments follow the loss nearly without noise, so neighbouring steps are correlated.
    expected = ("noise scale", "below 100 steps")
    assert [note for note in analysis.notes if not any(about in note for about in expected)] == []


def test_the_same_runs_give_the_same_bytes(made_up, analysis):
    names = ("fit.json", "measurements.csv", "noise_scale.csv")
    first = {name: (made_up[1] / name).read_bytes() for name in names}
    analyse(made_up[1])
    assert {name: (made_up[1] / name).read_bytes() for name in names} == first


def test_fit_json_holds_numbers_that_json_can_hold(made_up, analysis):
    fit = json.loads((made_up[1] / "fit.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert fit["law"]["exponent"] == analysis.fit.law.exponent
    assert fit["corpus"] == {"source": "made up"}


def test_an_unfinished_scan_is_not_fitted(made_up, tmp_path):
    shutil.copytree(made_up[1], tmp_path / "copy")
    next((tmp_path / "copy" / "runs").glob("1x32-b256-*/result.json")).unlink()
    with pytest.raises(UserError, match=r"copy .*1x32 · 256 tokens .*scan again"):
        analyse(tmp_path / "copy")


def test_a_folder_without_a_scan_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        analyse(tmp_path)


def test_unresolved_noise_counts_as_above_everything(analysis):
    results = dataclasses.replace(analysis.results)
    unresolved = [m._replace(resolved=False, b_simple=math.nan) for m in analysis.noise]
    vars(results)["noise_scale"] = unresolved  # as if it had been computed
    assert np.isinf(dataclasses.replace(analysis, results=results).noise_ratio)
    assert len(noise_ratios(unresolved, analysis.fit)) == len(noise_ratios(analysis.noise, analysis.fit)) > 80


def test_measurements_that_were_changed_after_the_fit_are_not_advised_on(made_up, tmp_path):
    folder = tmp_path / "scan"
    shutil.copytree(made_up[1], folder)
    analyse(folder)
    check_measurements(folder)
    table = folder / "measurements.csv"
    lines = table.read_text().splitlines()
    cells = lines[3].split(",")
    cells[4] = str(2 * float(cells[4]))  # steps: still well-formed
    table.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:], ""]))
    with pytest.raises(UserError, match=rf"{table} isn't as `fit` wrote it: run scaling-jax fit {folder}"):
        advise(folder, 2.3)
    analyse(folder)
    check_measurements(folder)
