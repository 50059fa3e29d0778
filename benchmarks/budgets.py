"""Does `fit_budget` find the best batches that were planted? How often its intervals hold them, and its law's exponent.

    python -m benchmarks.budgets [TABLES [FIRST]]      # 300 of each kind unless given, from the kind FIRST on

A table: five budgets, nine batches by factors of two, 3e-3 nats of noise, B_opt ∝ D^0.5. Four surfaces with a minimum,
with the best rate of each batch or five rates each; three without. Takes 25 minutes on two busy CPU cores for 300.
"""

import multiprocessing
import sys

import numpy as np

from scaling_jax.fitting import fit_budget
from tests.fitting.planted_budgets import MONOTONE, SURFACES, PlantedBudgets

_FEW = {"batches": tuple(512 * 2**k for k in range(7)), "budgets": (1e7, 2e7, 4e7, 8e7)}
KINDS = {
    **{name: PlantedBudgets(surface) for name, surface in SURFACES.items()},
    **{f"{name}, five rates": PlantedBudgets(surface, rates=5) for name, surface in SURFACES.items()},
    **{f"{name}, half the noise": PlantedBudgets(surface, noise=0.0015) for name, surface in SURFACES.items()},
    **{f"{name}, 7 × 4": PlantedBudgets(surface, **_FEW) for name, surface in SURFACES.items()},
    **{name: PlantedBudgets(surface) for name, surface in MONOTONE.items()},
}


def trial(job: tuple[str, int]) -> dict[str, float]:
    """{what: share} of one table."""
    name, seed = job
    planted = KINDS[name]
    fit = fit_budget(**planted.columns(np.random.default_rng(seed)))
    kinds = [budget.kind for budget in fit.budgets]
    found = {kind: kinds.count(kind) / len(kinds) for kind in ("U-shaped", "rising", "falling", "flat")}  # type: ignore
    if name in MONOTONE:
        return found
    held = [b.b_opt_interval[0] <= planted.b_opt(b.tokens) <= b.b_opt_interval[1] for b in fit.budgets]
    found["B_opt held"] = float(np.mean(held))
    if fit.law is not None:
        low, high = fit.law.exponent_interval
        found["exponent held"] = float(low <= planted.exponent <= high)
        middle = float(np.sqrt(np.prod(fit.law.valid_range)))
        low, high = fit.law.band(middle)
        found["law held at the middle"] = float(low <= planted.b_opt(middle) <= high)
    return found


def main(tables: int, first: int = 0) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for name in list(KINDS)[first:]:
            found = pool.map(trial, [(name, seed) for seed in range(tables)], chunksize=5)
            names = dict.fromkeys(key for one in found for key in one)
            means = {key: 100 * np.mean([one[key] for one in found if key in one]) for key in names}
            laws = sum("exponent held" in one for one in found)
            said = ", ".join(f"{key} {value:.1f} %" for key, value in means.items() if value)
            print(f"{name}: {said}; a law in {laws} of {tables}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3] or ["300"]))
