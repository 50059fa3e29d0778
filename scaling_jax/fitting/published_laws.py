"""Published laws for batch sizes: what each predicts, its formula, and where it was measured.

The laws predict three different quantities. Compare only laws of the same quantity.
  B_crit: a run needs twice the minimum number of steps and twice the minimum number of tokens.
  CBS20: a run needs 20 % more tokens than with linear scaling.
  B_opt: a run has the lowest loss at a fixed budget, or needs the fewest tokens to a loss.

Merrill et al. 2025 (arXiv 2505.23971) has no entry, because the paper has no formula. They measure B_crit along two
runs: near 0 at the start, about 4,096 documents of 4,096 tokens at the end.
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
    variable: str  # the argument of the law, with its unit
    constant: float | None  # tokens; None if we know only the exponent
    exponent: float
    valid_range: tuple[float, float] | None  # range of the variable that the authors measured; None if unknown
    corpus: str
    tokenizer: str
    source: str
    checked: str  # the authors' numbers that tests/fitting compares the law with, and what we could not find
    variable_unit: float = 1.0

    def __call__(self, variable):
        """Batch size in tokens. Warns outside the range that the authors measured, or if the range is unknown.

        Raises:
          ValueError: if only the exponent of the law is known.
        """
        if self.constant is None:
            raise ValueError(
                f"only the exponent of {self.key} is known, {self.exponent:g}, so it can't give a batch size: use "
                ".ratio(to, start)"
            )
        values = np.asarray(variable, float)
        self._check_range(values)
        tokens = self.constant * (values / self.variable_unit) ** self.exponent
        return float(tokens) if values.ndim == 0 else tokens

    def ratio(self, to: float, start: float) -> float:
        """(Batch size at `to`)/(batch size at `start`). Warns like a call."""
        self._check_range(np.array([to, start], float))
        return (to / start) ** self.exponent

    def _check_range(self, values: np.ndarray) -> None:
        if self.valid_range is None:
            warnings.warn(f"we don't know the range of {self.variable} in which {self.key} was measured", stacklevel=3)
            return
        low, high = self.valid_range
        outside = values[(values < low) | (values > high)]
        if outside.size:
            warnings.warn(
                f"{outside.flat[0]:g} is outside the range in which {self.key} was measured, {low:g} to {high:g} "
                f"({self.variable})",
                stacklevel=3,
            )


_UNKNOWN = "not known here"

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
    checked="the doubling for 13 % less loss in the caption, and B ∝ C^0.24 in section 6.1; range: the figure's axis",
)

_BERGSMA = PublishedLaw(
    key="bergsma2025-opt",
    formula="B_opt ∝ D^0.383",
    predicts="B_opt",
    variable="training data D in tokens",
    constant=None,
    exponent=0.383,
    valid_range=None,
    corpus="SlimPajama; models of 111M to 3.3B parameters, sequences of 2,048 tokens",
    tokenizer="50,257 tokens",
    source="Bergsma et al. 2025, arXiv 2505.13738, figure 1",
    checked="the exponents, as others quote them; we could not read the figure with the constants and the range",
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
            checked="both constants, in the paper's text; alpha_C = 0.054 of eq. 6.4, which follows from them; figure "
            "10's law",
        ),
        PublishedLaw(
            key="minicpm2024",
            formula="B_opt(L) = 1.21e9 tokens / L^6.24",
            predicts="B_opt",  # here: fewest tokens to the loss
            variable="loss on C4 in nats per token",
            constant=1.21e9,
            exponent=-6.24,
            valid_range=None,
            corpus="C4; models of 9M, 30M and 170M parameters",
            tokenizer="MiniCPM byte-pair encoding, 122,753 tokens",
            source="Hu et al. 2024, arXiv 2404.06395, section 3.2",
            checked="the formula, in the paper's text, and the batch of 3.93e6 tokens of section 6.2; the range of "
            "losses is in a figure only",
        ),
        PublishedLaw(
            key="deepseek2024",
            formula="B_opt(C) = 0.2920 tokens · C^0.3271",
            predicts="B_opt",
            variable="compute C = M·D in FLOPs, M non-embedding FLOPs per token",
            constant=0.2920,
            exponent=0.3271,
            valid_range=(1e17, 2e19),  # of the fit; the authors found the law good at 1e20 too
            corpus="DeepSeek's own, Chinese and English",
            tokenizer="DeepSeek byte-level byte-pair encoding, 102,400 tokens",
            source="DeepSeek-AI 2024, arXiv 2401.02954, eq. 1",
            checked="the batches of their 7B and 67B models (table 2), at C by their own formula",
        ),
        PublishedLaw(
            key="porian2024",
            formula="B_opt(N) = 0.7576 tokens · N^0.703",
            predicts="B_opt",
            variable="parameters N, with the head",
            constant=0.7576,
            exponent=0.703,
            valid_range=(5e6, 9.01e8),
            corpus="RefinedWeb",
            tokenizer=_UNKNOWN,
            source="Porian et al. 2024, arXiv 2406.19146; constant in tokens as quoted by Li et al. 2025, table 1",
            checked="0.00037·N^0.703 sequences of 2,048 tokens, as others quote it; range: the authors' list of "
            "models; their batch sweep may have used only the smaller models",
        ),
        PublishedLaw(
            key="steplaw2025",
            formula="B_opt(D) = 0.58 tokens · D^0.571",
            predicts="B_opt",
            variable="training data D in tokens",
            constant=0.58,
            exponent=0.571,
            valid_range=(2e9, 1e11),  # section 3.4.1: 2, 4, 8, 20 and 100 billion tokens
            corpus="English, Chinese-English and code mixtures; models of 60M to 1B non-embedding parameters",
            tokenizer=_UNKNOWN,
            source="Li et al. 2025, arXiv 2503.04715, eq. 1 and table 2",
            checked="the mean of the authors' 1,000 bootstrap fits, and the best batch of their released runs at 2e10 "
            "tokens; we could not find the tokenizer's name",
        ),
        PublishedLaw(
            key="zhang2024",
            formula="CBS20(N) = 93.2 sequences of 512 tokens · (N/1e6)^0.468",
            predicts="CBS20",
            variable="parameters N, Chinchilla-optimal data",
            constant=93.2 * 512,
            exponent=0.468,
            valid_range=(8.5e7, 1.2e9),
            corpus="C4",
            tokenizer=_UNKNOWN,
            source="Zhang et al. 2024, arXiv 2410.21676",
            checked="CBS20 of the five models whose steps the authors published; we could not read the paper's own "
            "table of CBS20 or find the tokenizer's name",
            variable_unit=1e6,
        ),
        _BERGSMA,
        dataclasses.replace(
            _BERGSMA,
            key="bergsma2025-crit",
            formula="B_crit ∝ D_min^0.462",
            predicts="B_crit",
            variable="least data D_min in tokens, E_min of the trade-off",
            exponent=0.462,
        ),
    )
}


def of_kind(predicts: str) -> tuple[PublishedLaw, ...]:
    """The laws that predict one quantity: "B_crit", "B_opt" or "CBS20".

    Raises:
      ValueError: for any other quantity.
    """
    laws = tuple(law for law in published.values() if law.predicts == predicts)
    if not laws:
        kinds = ", ".join(sorted({law.predicts for law in published.values()}))
        raise ValueError(f"no published law predicts {predicts!r}: use one of {kinds}")
    return laws
