"""Critical batch sizes as a power of the data or of the model's size, through points of one's own.

B_crit ∝ D_min^beta: Bergsma et al. 2025 (arXiv 2505.13738); ∝ N^gamma: Zhang et al. 2024 (arXiv 2410.21676), who found
nearly none of it. `forms` fits both to a whole scan and compares them with the law of the loss.
"""

import dataclasses

import numpy as np

from scaling_jax.fitting.loss_law import fit_loss_law


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """B_crit = constant·variable^exponent in tokens."""

    variable: str  # with its unit
    constant: float
    exponent: float
    exponent_interval: tuple[float, float]
    valid_range: tuple[float, float]  # of the variable; the law is untested elsewhere
    confidence: float

    def __call__(self, variable):
        """Critical batch size in tokens."""
        return self.constant * np.asarray(variable, float) ** self.exponent


def fit_data_law(data_tokens, b_crit, weights=None, *, confidence: float = 0.95) -> PowerLaw:
    """B_crit = constant·D_min^beta, by the least data D_min that reaches each loss (`Tradeoff.e_min`), tokens.

    The other arguments, errors and the intervals are those of `fit_loss_law`.
    """
    return _fit("D_min in tokens", data_tokens, b_crit, weights, confidence)


def fit_size_law(num_params, b_crit, weights=None, *, confidence: float = 0.95) -> PowerLaw:
    """B_crit = constant·N^gamma, by non-embedding parameters; arguments, errors and intervals as in `fit_loss_law`."""
    return _fit("N in parameters", num_params, b_crit, weights, confidence)


def _fit(name, variable, b_crit, weights, confidence) -> PowerLaw:
    variable = np.asarray(variable, float)
    try:
        law = fit_loss_law(variable, b_crit, weights, confidence=confidence)
    except ValueError as error:
        raise ValueError(str(error).replace("loss", name.split(" in ")[0])) from None
    return PowerLaw(name, law.b_star, law.exponent, law.exponent_interval, law.loss_range, confidence)
