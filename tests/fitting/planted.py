"""Synthetic batch-size scans whose law is known."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Planted:
    """B_crit(L) is a power law through `b_crit_range` at the ends of `loss_range`; noise is on log steps."""

    exponent: float = -4.8
    b_crit_middle: float = 1_800.0  # tokens, at the geometric middle of the losses
    loss_range: tuple[float, float] = (2.9, 1.75)
    num_losses: int = 14
    batches: tuple[int, ...] = tuple(256 * 2**i for i in range(7))
    num_models: int = 2
    num_seeds: int = 1
    noise: float = 0.05
    kind: str = "mixed"

    @property
    def losses(self) -> np.ndarray:
        return np.geomspace(*self.loss_range, self.num_losses)

    def b_crit(self, loss):
        return self.b_crit_middle * (loss / np.sqrt(np.prod(self.loss_range))) ** self.exponent

    def columns(self, rng) -> dict[str, np.ndarray]:
        """One draw, as the columns of `fit_scan`."""
        shape = (self.num_models, len(self.batches), self.num_seeds, self.num_losses)
        m, b, s, t = np.indices(shape).reshape(4, -1)
        batch, loss = np.array(self.batches)[b], self.losses[t]
        s_min = 300.0 * (self.loss_range[0] / loss) ** 6 / (1.0 + 0.3 * m)
        steps = s_min * (1.0 + self.b_crit(loss) / batch) * np.exp(self.errors(rng, shape).ravel())
        names = np.array([f"model{i}" for i in range(self.num_models)])[m]
        return {"model": names, "batch_tokens": batch, "target_loss": loss, "steps": steps, "run": s}

    def errors(self, rng, shape) -> np.ndarray:
        """Noise of unit size along each run, times `noise`."""
        whole = rng.standard_normal((*shape[:-1], 1))
        single = rng.standard_normal(shape)
        if self.kind == "constant":
            noise = whole + 0 * single
        elif self.kind == "independent":
            noise = single
        elif self.kind == "mixed":
            noise = np.sqrt(0.7) * whole + np.sqrt(0.3) * single
        elif self.kind == "wandering":  # correlation 0.9 between neighbouring losses
            noise = single.copy()
            for t in range(1, shape[-1]):
                noise[..., t] = 0.9 * noise[..., t - 1] + np.sqrt(1 - 0.81) * single[..., t]
        elif self.kind == "noisier small batches":
            noise = whole * np.linspace(1.6, 0.4, shape[1])[:, None, None] + 0 * single
        elif self.kind == "heavy tails":
            noise = rng.standard_t(3, (*shape[:-1], 1)) / np.sqrt(3) + 0 * single
        else:
            raise ValueError(self.kind)
        return self.noise * noise
