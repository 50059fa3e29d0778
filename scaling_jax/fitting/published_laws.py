"""Published laws for batch sizes: what each predicts, its formula, and where it was measured.

The laws predict three different quantities. Compare only laws of the same quantity.
  B_crit: a run needs twice the minimum number of steps and twice the minimum number of tokens.
  CBS20: a run needs 20 % more tokens than with linear scaling.
  B_opt: a run has the lowest loss at a fixed budget, or needs the fewest tokens to a loss.

These have no entry, or an entry for a part only:
  Merrill et al. 2025 (arXiv 2505.23971): no formula. They measure B_crit along two runs: near 0 at the start, about
    4,096 documents of 4,096 tokens at the end.
  Zhou et al. 2026 (arXiv 2601.05034): the tokens to a loss as a function of the steps, in three pieces. Its minimum is
    B_opt, which grows as the loss falls. We found no formula of B_opt in the loss, and no fitted constants.
  Schaipp 2026 (arXiv 2607.01487): a surface, loss = E + A/N^alpha + B/M^beta + C/K^gamma for N parameters, batches of M
    tokens and K steps. We couldn't read its constants. The batch that is best on it for D = M·K has an entry.
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
    formula="B_opt(D) = 0.0306 sequences of 2,048 tokens · D^0.383",
    predicts="B_opt",
    variable="training data D in tokens",
    constant=0.0306 * 2048,
    exponent=0.383,
    valid_range=None,
    corpus="SlimPajama; models of 111M to 3.3B parameters, sequences of 2,048 tokens, 20 to 1,280 tokens per parameter",
    tokenizer="50,257 tokens",
    source="Bergsma et al. 2025, arXiv 2505.13738v2, figure 1",
    checked="constant and exponent, as two others quote the figure, which we could not read; the authors' 10 to 90 % "
    "range of the exponent, 0.367 to 0.391; we don't know the range of D",
)

_ZHANG = PublishedLaw(
    key="zhang2024",
    formula="CBS20(N) = 93.2 sequences of 512 tokens · (N/1e6)^0.468",
    predicts="CBS20",
    variable="parameters N, Chinchilla-optimal data",
    constant=93.2 * 512,
    exponent=0.468,
    valid_range=(8.5e7, 1.2e9),
    corpus="C4",
    tokenizer="GPT-NeoX byte-pair encoding, 50,280 tokens",
    source="Zhang et al. 2024, arXiv 2410.21676",
    checked="CBS20 of the five models whose steps the authors published; tokenizer: their settings; we could not read "
    "the paper's own table of CBS20",
    variable_unit=1e6,
)

_SHUAI = PublishedLaw(
    key="shuai2024-data",
    formula="B_opt(D) = 3,240 tokens · D^0.264",
    predicts="B_opt",
    variable="training data D in tokens",
    constant=3.24e3,
    exponent=0.264,
    valid_range=None,
    corpus="not known here; models of 125M to 2.6B parameters, up to 3e11 tokens",
    tokenizer=_UNKNOWN,
    source="Shuai et al. 2024, arXiv 2412.01505",
    checked="constant, exponent and unit, as the code and a paper of one other group use them; we found no number of "
    "the authors to compare with",
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
        _ZHANG,
        dataclasses.replace(
            _ZHANG,
            key="zhang2024-data",
            formula="CBS20(D) = 22.91 sequences of 512 tokens · (D/1e6)^0.47",
            variable="training data D in tokens, for Chinchilla-optimal models",
            constant=22.91 * 512,
            exponent=0.47,
            valid_range=(1.7e9, 2.4e10),
            checked="constant and exponent, as others quote them, some with D in units of 1e9, which the authors' runs "
            "rule out. It equals their law of N at 20 tokens per parameter: 93.20/22.91 = 20^0.468. So theirs is "
            "0.468, printed as 0.47, and the 0.462 that some give them is Bergsma et al.'s. CBS20 of the five models "
            "whose steps they published; range: those models' tokens",
        ),
        dataclasses.replace(
            _ZHANG,
            key="zhang2024-fixed-data",
            formula="CBS20(N) = 621.341 sequences of 512 tokens · (N/1e6)^0.087",
            variable="parameters N, trained on 3.072e9 tokens",
            constant=621.341 * 512,
            exponent=0.087,
            source="Zhang et al. 2024, arXiv 2410.21676, section 3.3",
            checked="constant and exponent, as others quote them; the authors' other two laws and their runs of 151M "
            "parameters, for which 3.072e9 tokens are Chinchilla-optimal",
        ),
        _SHUAI,
        dataclasses.replace(
            _SHUAI,
            key="shuai2024-compute",
            formula="B_opt ∝ C^0.102",
            variable="compute C in FLOPs",
            constant=None,
            exponent=0.102,
            checked="the exponent, in a summary of the paper; it is the authors' exponent of D_opt less that of S_opt, "
            "0.536 - 0.434; we could not find the constant",
        ),
        PublishedLaw(
            key="schaipp2026",
            formula="B_opt(D) = 0.667 tokens · D^0.566",
            predicts="B_opt",
            variable="training data D in tokens",
            constant=0.667,
            exponent=0.566,
            valid_range=None,
            corpus="the released runs of Li et al. 2025; models of 50M to 1B parameters",
            tokenizer=_UNKNOWN,
            source="Schaipp 2026, arXiv 2607.01487",
            checked="constant and exponent, as two others quote them; the best batch at 2e10 tokens of the runs that "
            "others name as its data; the least data was 2e9 tokens, the most is not known here",
        ),
        _BERGSMA,
        dataclasses.replace(
            _BERGSMA,
            key="bergsma2025-crit",
            formula="B_crit(D_min) = 0.0471 sequences of 2,048 tokens · D_min^0.462",
            predicts="B_crit",
            variable="least data D_min in tokens, E_min of the trade-off",
            constant=0.0471 * 2048,
            exponent=0.462,
            source="Bergsma et al. 2025, arXiv 2505.13738v2, figure 1 and eq. 7",
            checked="constant, as one other quotes the figure, which we could not read, and exponent, as two do. Some "
            "give 0.462 to Zhang et al. and 0.47 to Bergsma et al.; Zhang et al.'s constants leave 0.468 for theirs "
            "(zhang2024-data). The authors' 10 to 90 % range over all their points, 0.491 to 0.526, lies above 0.462. "
            "We don't know the range of D_min",
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
