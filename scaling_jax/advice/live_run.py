"""Advice for a number of tokens from one run that trains, or has trained: its noise scale, carried to the horizon.

The noise scale tr(Σ)/|G|² stands for the local B_crit = dE_min/dS_min at the tokens seen so far. If B_crit ∝ D_min^p,
the local one is B_crit/(1 - p): from S_min = D_min/B_crit follows dS_min/dD_min = (1 - p)/B_crit. The run can't know p
beyond its own tokens, so p comes from published laws, which were measured across models.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_jax.advice.choices import Hardware
from scaling_jax.advice.horizon import (
    HorizonAdvice,
    Reference,
    around,
    check_horizon,
    choice,
    least_data,
    published_answers,
    rate_notes,
)
from scaling_jax.fitting import published
from scaling_jax.io import UserError
from scaling_jax.noise_scale import Estimate
from scaling_jax.results.runs import RunRecord, last_noise_scale, read_run
from scaling_jax.scanning.budget_records import is_budget_scan

EXPONENT = 0.47  # of D; Zhang et al. 2024, and 0.462 of Bergsma et al. 2025
EXPONENTS = (0.46, 0.53)  # both, and Bergsma et al.'s 10 to 90 % range over all their points
_GROWTH_FACTOR = 16  # of tokens, over which the run's own exponent is told,
_FEWEST_WINDOWS = 6  # if there are as many windows,
_WIDEST = 1.0  # and its interval is at most so wide


class Growth(NamedTuple):
    """How the noise scale grew along a run: ∝ tokens^exponent."""

    exponent: float
    low: float
    high: float
    tokens: tuple[float, float]  # of the first and the last window


def run_folder_of(results: Path) -> Path | None:
    """The folder of a single run, if `results` is one, or a results folder with one run and no scan; else None.

    Raises:
      UserError: if it holds several single runs. Names some.
    """
    if (results / "config.json").exists():
        return results
    if (results / "experiment.json").exists() or is_budget_scan(results):
        return None
    runs = [path.parent for path in sorted(results.glob("runs/*/config.json"))]
    if len(runs) > 1:
        raise UserError(f"{results} holds {len(runs)} runs: give the folder of one of them, such as {runs[0]}")
    return runs[0] if runs else None


def advise_run(
    folder: Path,
    tokens: float,
    *,
    model: str | None = None,
    hardware: Hardware | None = None,
    weight_decay: float | None = None,
) -> HorizonAdvice:
    """Advice for a run on `tokens` tokens, from the noise scale of a run that may still train.

    Args:
      folder: of the run, with its config.json and metrics.jsonl.
      tokens: D, of the whole run to come.
      model: checked, if given.
      hardware: for wall times.
      weight_decay: of the run, AdamW's; its timescale B/(ηλD) is kept.

    Raises:
      UserError: if the run has too few steps, or its noise scale isn't resolved.
    """
    check_horizon(tokens, weight_decay)
    record = read_run(folder)
    run = record.run
    if model not in (None, run.model.name):
        raise UserError(f"{folder} is a run of {run.model.name}, not of {model}: leave out --model")
    noise, steps = _noise_now(record)
    before = record.course.batch_tokens[: (steps.start + steps.stop) // 2]  # up to the middle of what was measured
    law = _Law.of(before, noise.value, EXPONENT)
    batch = law(tokens / 2)
    ends = [_Law.of(before, b, p)(tokens / 2) for b in (noise.low, noise.high) for p in EXPONENTS]
    seen = float(record.course.tokens[-1])
    reference = Reference(run.batch_tokens, run.max_tokens or seen, run.learning_rate)
    rows = []
    for size in around(batch):
        rate = run.learning_rate * math.sqrt(size / run.batch_tokens)
        row = choice(size, tokens, rate, hardware, weight_decay, reference)
        rows.append(row._replace(cost=1 - least_data(law, tokens, size) / tokens))
    interval = f"[{_short(noise.low)}, {_short(noise.high)}]"
    return HorizonAdvice(
        tokens=tokens,
        model=run.model.name,
        quantity="B_crit",
        batch=batch,
        interval=(min(ends), max(ends)),
        law=(
            f"the run's noise scale, {_short(noise.value)} {interval} tokens in its last {noise.steps:,} steps, "
            f"carried by B_crit ∝ D_min^{EXPONENT} [{EXPONENTS[0]}, {EXPONENTS[1]}] of published laws"
        ),
        measured=(float(record.course.tokens[steps.start]), seen),
        rows=tuple(rows),
        hardware=hardware,
        published=published_answers("B_crit", "least data D_min", tokens / 2),
        notes=(*_notes(record, noise, tokens), *rate_notes(rows, weight_decay)),
    )


def growth_of(record: RunRecord) -> Growth | None:
    """The exponent with which the noise scale grew over the last factor of 16 in a run's tokens.

    None with too few resolved windows. The 95 % interval is that of a line through them.
    """
    windows = [w for w in record.noise if w.noise.resolved and w.noise.value > 0]
    windows = [w for w in windows if w.tokens >= windows[-1].tokens / _GROWTH_FACTOR]
    if len(windows) < _FEWEST_WINDOWS:
        return None
    x, y = np.log([w.tokens for w in windows]), np.log([w.noise.value for w in windows])
    design = np.stack([np.ones_like(x), x], axis=1)
    coefficients, rss, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(x) - 2
    error = math.sqrt(float(rss[0]) / freedom / float(np.sum((x - x.mean()) ** 2)))
    half = float(special.stdtrit(freedom, 0.975)) * error
    slope = float(coefficients[1])
    return Growth(slope, slope - half, slope + half, (windows[0].tokens, windows[-1].tokens))


@dataclasses.dataclass(frozen=True)
class _Law:
    """B_crit(D_min) through a run's present point."""

    b_crit: float
    least: float  # D_min at the present point
    exponent: float

    @classmethod
    def of(cls, batch_tokens: np.ndarray, noise_tokens: float, exponent: float) -> "_Law":
        """From the noise scale after steps with these batches `[steps]`; of their tokens, D_min is E_min's share."""
        b_crit = (1 - exponent) * noise_tokens
        return cls(b_crit, float(np.sum(batch_tokens / (1 + batch_tokens / b_crit))), exponent)

    def __call__(self, least: float) -> float:
        return float(self.b_crit * (least / self.least) ** self.exponent)


def _noise_now(record: RunRecord) -> tuple[Estimate, range]:
    """The noise scale in tokens over the last steps, and which steps these are."""
    course = record.course
    noise = last_noise_scale(course) if len(course.batch_tokens) else None
    if noise is None:
        raise UserError(
            f"{record.folder} has too few steps for a noise scale ({len(course.batch_tokens):,}): train it longer"
        )
    if not noise.resolved or noise.low <= 0:
        raise UserError(
            f"{record.folder}: the noise scale of the last {noise.steps:,} steps isn't resolved, it is at least "
            f"{_short(max(noise.low, 0.0))} tokens: train longer, or with a larger batch"
        )
    count = len(course.tokens)
    return noise, range(count - noise.steps - noise.flagged_steps, count)


def _notes(record: RunRecord, noise: Estimate, tokens: float) -> list[str]:
    notes = [
        "the noise scale is tr(Σ)/|G|², which knows nothing of curvature and Adam: on this package's demo, B_crit of a "
        "scan was 1.4 to 4.4 times as large as this estimate. A scan measures B_crit itself"
    ]
    law = published["zhang2024-data"]
    assert law.valid_range is not None
    low, high = law.valid_range
    if not low <= record.course.tokens[-1] <= tokens <= high:
        notes.append(
            f"the exponent was measured across models, each trained on 20 tokens per parameter, for {_short(low)} to "
            f"{_short(high)} tokens (Zhang et al. 2024): your run isn't inside that"
        )
    growth = growth_of(record)
    if growth is not None and growth.high - growth.low <= _WIDEST:
        first, last = growth.tokens
        notes.append(
            f"along this run the noise scale grew as D^{growth.exponent:.2f} [{growth.low:.2f}, {growth.high:.2f}], "
            f"from {_short(first)} to {_short(last)} tokens"
        )
    if noise.warning:
        notes.append(f"noise scale: {noise.warning}")
    if record.run.schedule is not None and record.course.tokens[-1] > record.run.schedule.decay_from:
        notes.append("the learning rate decays in the steps that were measured; the noise scale is of that loss")
    notes.append("learning rates are the run's own times √(batch/its batch)")
    return notes


def _short(tokens: float) -> str:
    """Three digits; a large number with an exponent."""
    return f"{float(f'{tokens:.3g}'):,.0f}" if tokens < 1e7 else f"{tokens:.3g}".replace("e+0", "e").replace("e+", "e")
