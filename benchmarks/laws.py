"""Do the fits find what was planted? Simulated scans of each kind, and how often intervals hold the truth.

    python -m benchmarks.laws [SCANS [FIRST]]      # 200 of each kind unless given, from the kind FIRST on

Two models, seven batch sizes, 14 losses; B_crit ∝ L^-4.8; noise of 5 % on steps, mostly shared along a run. Takes about
20 minutes on two CPU cores for 200. Expect 93 to 97 % coverage on hyperbolas, and every other kind recognised.
"""

import multiprocessing
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting import fit_scan
from scaling_jax.fitting.forms import further_fits
from tests.fitting.planted import Planted
from tests.fitting.test_shapes import bent

PLANTED = Planted()
OFFSET = 15.0  # steps
LOCAL = 1.826  # local over cumulative B_crit where S_min ∝ L^-6, in windows of 1.5 times the steps


class Kind(NamedTuple):
    name: str
    columns: Callable[[dict], dict]  # the columns of `fit_scan` from those of hyperbolas


def with_offset(columns: dict) -> dict:
    return columns | {"steps": columns["steps"] + OFFSET, "offset_steps": np.full(len(columns["steps"]), OFFSET)}


def same_law_of_data(columns: dict) -> dict:
    """Both models need the same tokens to a loss, so that B_crit is one power of D_min."""
    return columns | {"steps": columns["steps"] * np.where(columns["model"] == "model1", 1.3, 1.0)}


ONE_LAW_OF_DATA = 1
KINDS = (
    Kind("hyperbolas", lambda columns: columns),
    Kind("one law of data", same_law_of_data),
    Kind("known offset", with_offset),
    Kind("a from 0.5 to 1.5", lambda columns: bent(columns, 0.5, 1.5)),
    Kind("a from 0.5 to 1", lambda columns: bent(columns, 0.5, 1.0)),
    Kind("a = 0.8", lambda columns: bent(columns, 0.8, 0.8)),
    Kind("U-shaped, a = 1.5", lambda columns: bent(columns, 1.5, 1.5)),
)


def trial(job: tuple[int, int]) -> dict[str, float]:
    """{what: 0 or 1, or a share} of one scan."""
    kind, seed = job
    fit = fit_scan(**KINDS[kind].columns(PLANTED.columns(np.random.default_rng(seed))), resamples=300)
    truth = PLANTED.b_crit(np.array([point.loss for point in fit.points]))
    intervals = np.array([point.b_crit_interval for point in fit.points])
    shown = np.array([point.shown for point in fit.points])
    found = {
        "hyperbolas rejected": float(fit.shape_p < 0.05),
        "called U-shaped": float(any("U-shaped" in note and not note.startswith("local") for note in fit.notes)),
        "law": float(fit.law is not None),
    }
    if shown.any():
        held = (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
        found["B_crit held"] = float(held[shown].mean())
    if fit.law is not None:
        low, high = fit.law.exponent_interval
        found["exponent held"] = float(low <= PLANTED.exponent <= high)
    if kind == 0 and fit.local is not None and fit.local.law is not None:
        low, high = fit.local.law.exponent_interval
        found["local exponent held"] = float(low <= PLANTED.exponent <= high)
        local = np.array([point.b_crit_interval for point in fit.local.points])
        truth = LOCAL * PLANTED.b_crit(np.array([point.loss for point in fit.local.points]))
        found["local B_crit held"] = float(((local[:, 0] <= truth) & (truth <= local[:, 1])).mean())
    if kind == ONE_LAW_OF_DATA and seed % 2 == 0:
        _, forms = further_fits(fit, None)
        intervals = [form.exponent_interval for form in forms if form.form == "data" and form.exponent_interval]
        found["law of data"] = float(len(intervals))
        for low, high in intervals:
            found["exponent of data held"] = float(low <= -PLANTED.exponent / (6 - PLANTED.exponent) <= high)
    return found


def main(scans: int, first: int = 0) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, kind in list(enumerate(KINDS))[first:]:
            found = pool.map(trial, [(number, seed) for seed in range(scans)], chunksize=5)
            names = dict.fromkeys(name for one in found for name in one)
            rates = {name: [one[name] for one in found if name in one] for name in names}
            said = [f"{name} {100 * np.mean(values):.1f} % of {len(values)}" for name, values in rates.items()]
            print(f"{kind.name}: {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3] or ["200"]))
