"""Laws of the literature for batch sizes, each with what it predicts and where it was measured.

B_crit, CBS20 and B_opt are three different quantities: compare a law only with its own kind.
"""

import dataclasses
import warnings

import numpy as np


@dataclasses.dataclass(frozen=True)
class PublishedLaw:
    """tokens = constant·(variable/variable_unit)^exponent."""

    key: str
    formula: str
    predicts: str  # "B_crit", "B_opt" or "CBS20"
    variable: str  # what the law is a function of, with its unit
    constant: float  # tokens
    exponent: float
    valid_range: tuple[float, float]  # of the variable, where the authors measured
    corpus: str
    tokenizer: str
    source: str
    variable_unit: float = 1.0

    def __call__(self, variable):
        """Batch size in tokens; warns outside the range that the authors measured."""
        values = np.asarray(variable, float)
        low, high = self.valid_range
        if ((values < low) | (values > high)).any():
            outside = values[(values < low) | (values > high)].flat[0]
            warnings.warn(
                f"{self.key} was measured for {self.variable} between {low:g} and {high:g}; {outside:g} is outside",
                stacklevel=2,
            )
        tokens = self.constant * (values / self.variable_unit) ** self.exponent
        return float(tokens) if values.ndim == 0 else tokens


_KAPLAN = PublishedLaw(
    key="kaplan2020",
    formula="B_crit(L) = 2.1e8 tokens · L^-4.8",
    predicts="B_crit",
    variable="loss in nats per token",
    constant=2.1e8,
    exponent=-4.8,
    valid_range=(3.0, 10.0),
    corpus="WebText2",
    tokenizer="GPT-2 byte-pair encoding, 50,257 tokens",
    source="Kaplan et al. 2020, arXiv 2001.08361, figure 10",
)

published = {
    law.key: law
    for law in (
        _KAPLAN,
        dataclasses.replace(
            _KAPLAN,
            key="kaplan2020-rounded",
            formula="B_crit(L) = B_*/L^(1/alpha_B), B_* = 2e8 tokens, alpha_B = 0.21",
            constant=2e8,
            exponent=-1 / 0.21,
            source="Kaplan et al. 2020, arXiv 2001.08361, eq. 1.4 and 5.3",
        ),
    )
}
