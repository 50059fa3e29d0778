"""Made-up tables of losses at fixed tokens, whose best batches are known."""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import optimize


@dataclasses.dataclass(frozen=True)
class PlantedBudgets:
    """loss = floor of the budget + surface(log B - log B_opt(D)) + 0.02·(log rate - log best rate)² + noise.

    The best rate goes as √B. The surface is shifted so that its minimum is at 0.
    """

    surface: Callable[[np.ndarray], np.ndarray]
    exponent: float = 0.5
    middle: float = 256.0 * 16  # B_opt in tokens at the middle budget
    batches: tuple[int, ...] = tuple(256 * 2**k for k in range(9))
    budgets: tuple[float, ...] = (1e7, 2e7, 4e7, 8e7, 16e7)
    rates: int = 0  # learning rates by factors of two at each batch; 0: only the best one
    noise: float = 0.003  # nats

    def b_opt(self, tokens):
        return self.middle * (np.asarray(tokens) / np.sqrt(self.budgets[0] * self.budgets[-1])) ** self.exponent

    def columns(self, rng) -> dict[str, np.ndarray]:
        """One draw, as the columns of `fit_budget`."""
        at = optimize.minimize_scalar(self.surface, bounds=(-3, 3), method="bounded", options={"xatol": 1e-7}).x
        offsets = np.arange(max(self.rates, 1)) - max(self.rates, 1) // 2
        d, b, k = (x.ravel() for x in np.meshgrid(self.budgets, self.batches, offsets, indexing="ij"))
        u = np.log(b / self.b_opt(d))
        rate = 1e-3 * np.sqrt(b / 4096) * 2.0**k * 1.3  # the grid of rates misses the best one
        rise = 0.02 * np.log(rate / (1e-3 * np.sqrt(b / 4096))) ** 2 if self.rates else 0.0
        loss = 2.0 + 400.0 * d**-0.35 + self.surface(u + at) - self.surface(at) + rise
        loss = loss + self.noise * rng.standard_normal(len(d))
        columns = {"model": np.full(len(d), "m"), "batch_tokens": b, "tokens": d, "loss": loss}
        return columns | ({"learning_rate": rate} if self.rates else {})


def _softplus(u):
    return np.logaddexp(0.0, u)


SURFACES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "parabola": lambda u: 0.006 * u**2,
    "two arms": lambda u: 0.1 * (_softplus(0.9 * (u - 2)) + _softplus(-0.9 * (u + 2))),
    "flat bottom": lambda u: 0.1 * (_softplus(u - 2.5) + 0.6 * _softplus(-1.2 * (u + 1.5))),
    "steep side": lambda u: 0.03 * (np.exp(0.6 * u) / 0.6 + np.exp(-0.3 * u) / 0.3),
}
MONOTONE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rising": lambda u: 0.1 * _softplus(u),  # McCandlish's hyperbola: tokens grow by 1 + B/B_crit
    "rising line": lambda u: 0.01 * u,
    "falling": lambda u: 0.1 * _softplus(-u),
}
