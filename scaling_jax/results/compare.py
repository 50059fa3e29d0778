"""Scans side by side: steps and tokens to the same losses, B_crit, and what one saves over another at each batch."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from scaling_jax.fitting import CriticalBatch, ScanFit
from scaling_jax.io import UserError
from scaling_jax.io.files import parse_json, read_whole
from scaling_jax.results.results import check_measurements
from scaling_jax.results.table import Table, fit_table

NUM_LOSSES = 8  # at which scans are compared, between the losses that both reached
_RESAMPLES = 50  # for the law, which isn't shown
_PARAMETERS = 3  # of a trade-off with a free shape


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One of the scans that are compared."""

    name: str
    table: Table
    fit: ScanFit
    unit_tokens: float  # tokens in a unit of the comparison: 1, or bytes per token if it is in bytes
    unit_loss: float  # likewise for losses: 1, or bits per byte in a nat per token
    corpus: dict[str, Any]

    def curve(self, model: str, batch: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(losses, steps)] of each run at a batch, rising losses; only what was reached."""
        rows = zip(
            self.table.model,
            self.table.batch_tokens,
            self.table.run,
            self.table.target_loss,
            self.table.steps,
            strict=True,
        )
        runs: dict[str, list[tuple[float, float]]] = {}
        for name, size, run, loss, steps in rows:
            if name == model and size == batch and math.isfinite(steps):
                runs.setdefault(run, []).append((loss * self.unit_loss, steps))
        return [tuple(np.array(sorted(points)).T) for points in runs.values()]  # type: ignore[misc]

    def points(self, model: str) -> list[CriticalBatch]:
        return [point for point in self.fit.points if point.model == model]

    def noise(self, model: str) -> tuple[float, int]:
        """(standard deviation of a run's log steps around the trade-offs, degrees of freedom)."""
        squares, freedom, least = 0.0, 0, 0
        for point in self.points(model):
            count = len(point.residuals)
            if count > _PARAMETERS:
                squares += float(np.sum(point.residuals**2))
                freedom += count - _PARAMETERS
                least = max(least, count - _PARAMETERS)
        return (
            (math.sqrt(squares / freedom), least) if freedom else (math.nan, 0)
        )  # losses of one run aren't independent


class AtBatch(NamedTuple):
    """What one scan saves over another at one batch size."""

    batch: float  # in the first scan's unit, tokens or bytes
    steps: tuple[float, float]  # of both to the lowest loss that both reached; NaN if one didn't
    tokens: tuple[float, float]
    saving: float  # share of tokens saved to that loss; NaN if one didn't reach it
    interval: tuple[float, float]
    mean_saving: float  # the mean over the losses that both reached at this batch
    mean_interval: tuple[float, float]
    losses: int  # number of these


class AtLoss(NamedTuple):
    """Both trade-offs at the loss of a point of the first scan, or next to it."""

    name: str
    loss: float
    b_crit: float  # NaN if it isn't shown
    interval: tuple[float, float]
    s_min: float
    e_min: float  # NaN for a free shape, whose tokens have no minimum


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """One scan against the first, for one model of each."""

    names: tuple[str, str]  # of the scans
    models: tuple[str, str]
    losses: np.ndarray  # `[losses]`, falling
    batches: tuple[AtBatch, ...]
    at_losses: tuple[AtLoss, ...]
    overall: float  # share of tokens saved over all batches
    overall_interval: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """What `scaling-jax compare` prints."""

    sides: tuple[Side, ...]
    pairs: tuple[Pair, ...]
    in_bytes: bool  # True if losses are bits per byte and tokens are bytes, as tokenizers differ
    notes: tuple[str, ...]
    confidence: float


def compare_scans(
    paths: Sequence[Path], *, bytes_per_token: Sequence[float] = (), confidence: float = 0.95
) -> Compared:
    """Compares results folders or tables of steps to losses; each with the first.

    Args:
      paths: folders after `scaling-jax fit`, or CSV tables.
      bytes_per_token: of each, to compare in bits per byte and bytes; empty takes what the folders know, where their
        tokenizers differ.
      confidence: of the intervals.

    Raises:
      UserError: for fewer than two, or if there is nothing to compare. Says what is missing.
    """
    if len(paths) < 2:
        raise UserError("compare takes two results folders or tables, or more")
    if bytes_per_token and (len(bytes_per_token) != len(paths) or not all(0 < b < math.inf for b in bytes_per_token)):
        raise UserError(f"--bytes-per-token needs {len(paths)} positive numbers, one for each folder or table")
    corpora = [_corpus(path) for path in paths]
    known: list[float | None] = list(bytes_per_token) or [corpus.get("test_bytes_per_token") for corpus in corpora]
    tokenizers = {corpus.get("tokenizer_sha256") for corpus in corpora if corpus}
    in_bytes = bool(bytes_per_token) or len(tokenizers) > 1
    if in_bytes and not all(known):
        raise UserError("tokenizers differ: give --bytes-per-token, one for each folder or table, to compare in bytes")
    sides = []
    for path, name, corpus, per_token in zip(paths, _names(paths), corpora, known, strict=True):
        table = path / "measurements.csv" if path.is_dir() else path
        if not table.exists():
            raise UserError(f"there is no {table}: give a results folder after `scaling-jax fit`, or a CSV of steps")
        if path.is_dir():
            check_measurements(path)
        found = fit_table(table, laws=False, resamples=_RESAMPLES)
        unit = float(per_token) if in_bytes and per_token else 1.0
        sides.append(Side(name, found.table, found.fit, unit, 1 / (unit * math.log(2)) if in_bytes else 1.0, corpus))
    pairs = [pair for side in sides[1:] for pair in _pairs(sides[0], side, confidence)]
    return Compared(tuple(sides), tuple(pairs), in_bytes, tuple(_notes(sides, pairs)), confidence)


def _names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name.removesuffix(".csv") for path in paths]
    return [str(path) if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


def _corpus(path: Path) -> dict[str, Any]:
    """What fit.json of a folder says of its text; empty for a table."""
    fit = path / "fit.json"
    if not path.is_dir() or not fit.exists():
        return {}
    try:
        corpus = parse_json(read_whole(fit)).get("corpus")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"can't read {fit} ({error}): run scaling-jax fit {path}") from None
    return corpus if isinstance(corpus, dict) else {}


def _pairs(first: Side, second: Side, confidence: float) -> list[Pair]:
    ours, theirs = (list(dict.fromkeys(side.table.model)) for side in (first, second))
    common = [(name, name) for name in ours if name in theirs]
    if not common and len(ours) == len(theirs) == 1:
        common = [(ours[0], theirs[0])]
    if not common:
        raise UserError(
            f"{first.name} and {second.name} have no model in common ({', '.join(ours)}; {', '.join(theirs)}): rename "
            "one in a table"
        )
    found = [pair for models in common if (pair := _pair(first, second, models, confidence)) is not None]
    if not found:
        raise UserError(
            f"{first.name} and {second.name} reached no loss in common at a common batch size: compare scans of the "
            "same batch sizes and target losses"
        )
    return found


def _pair(first: Side, second: Side, models: tuple[str, str], confidence: float) -> Pair | None:
    sides = (first, second)
    found = {}
    for batch in _batches(first, models[0]):
        beside = _beside(_batches(second, models[1]), batch)
        ours = first.curve(models[0], batch / first.unit_tokens)
        theirs = [(weight, second.curve(models[1], b / second.unit_tokens)) for b, weight in beside]
        if ours and theirs and all(runs for _, runs in theirs):
            runs = [*ours, *(run for _, some in theirs for run in some)]
            # from the lowest loss that all of them reached to the highest that none had passed
            span = max(run[0][0] for run in runs), min(run[0][-1] for run in runs)
            if span[0] <= span[1]:
                found[batch] = (ours, theirs, span)
    if not found:
        return None
    lowest, highest = min(low for _, _, (low, _) in found.values()), max(high for _, _, (_, high) in found.values())
    losses = np.geomspace(highest, lowest, NUM_LOSSES)
    noises = [side.noise(m) for side, m in zip(sides, models, strict=True)]
    freedom = sum(noise[1] for noise in noises)
    t = special.stdtrit(freedom, 0.5 + confidence / 2) if freedom else math.inf
    rows, ratios, variances = [], [], []
    for batch, (ours, theirs, (low, high)) in found.items():
        inside = losses[(losses >= low * (1 - 1e-9)) & (losses <= high * (1 + 1e-9))]
        if not inside.size:
            continue
        logs = _log_steps(ours, inside), np.sum([w * _log_steps(runs, inside) for w, runs in theirs], axis=0)
        ratio = float(np.mean(logs[1] - logs[0]))
        # Losses of one run share its error, so a mean over losses is no more certain than one of them.
        variance = noises[0][0] ** 2 / len(ours)
        variance += noises[1][0] ** 2 * sum(weight**2 / len(runs) for weight, runs in theirs)
        steps = (math.nan, math.nan)
        if math.isclose(inside[-1], lowest, rel_tol=1e-6):
            steps = (float(np.exp(logs[0][-1])), float(np.exp(logs[1][-1])))
        half = t * math.sqrt(variance)
        at_lowest = _saving(math.log(steps[1] / steps[0]), half)
        tokens = (steps[0] * batch, steps[1] * batch)
        rows.append(AtBatch(batch, steps, tokens, *at_lowest, *_saving(ratio, half), len(inside)))
        ratios.append(ratio)
        variances.append(variance)
    if not rows:
        return None
    overall, error = float(np.mean(ratios)), math.sqrt(sum(variances)) / len(variances)
    share, interval = _saving(overall, t * error)
    return Pair(
        names=(first.name, second.name),
        models=models,
        losses=losses,
        batches=tuple(rows),
        at_losses=tuple(_at_losses(sides, models, losses)),
        overall=share,
        overall_interval=interval,
    )


def _saving(log_ratio: float, half: float) -> tuple[float, tuple[float, float]]:
    """(share saved, its interval) from the log of tokens over tokens, and half its interval."""
    return 1 - math.exp(log_ratio), (1 - math.exp(log_ratio + half), 1 - math.exp(log_ratio - half))


def _batches(side: Side, model: str) -> list[float]:
    """The batch sizes of a model, in the unit of the comparison."""
    sizes = {size for name, size in zip(side.table.model, side.table.batch_tokens, strict=True) if name == model}
    return sorted(size * side.unit_tokens for size in sizes)


def _beside(batches: list[float], batch: float) -> list[tuple[float, float]]:
    """[(batch, weight)] of those between which a batch lies, linear in logs; empty outside of them."""
    for b in batches:
        if math.isclose(b, batch, rel_tol=1e-9):
            return [(b, 1.0)]
    for low, high in itertools.pairwise(batches):
        if low < batch < high:
            share = math.log(batch / low) / math.log(high / low)
            return [(low, 1 - share), (high, share)]
    return []


def _log_steps(runs: list[tuple[np.ndarray, np.ndarray]], losses: np.ndarray) -> np.ndarray:
    """Mean log steps of runs to losses, linear in log loss between those measured."""
    return np.mean([np.interp(np.log(losses), np.log(run[0]), np.log(run[1])) for run in runs], axis=0)


def _at_losses(sides: tuple[Side, Side], models: tuple[str, str], losses: np.ndarray) -> list[AtLoss]:
    """The fitted trade-offs of both, next to three of the losses."""
    found: list[AtLoss] = []
    for loss in losses[[0, len(losses) // 2, -1]]:
        for side, model in zip(sides, models, strict=True):
            points = side.points(model)
            if not points:
                continue
            point = min(points, key=lambda p: abs(math.log(p.loss * side.unit_loss / loss)))
            shown = point.shown and not point.tradeoff.one_sided
            unit = side.unit_tokens if shown else math.nan
            low, high = point.b_crit_interval
            row = AtLoss(
                name=side.name,
                loss=point.loss * side.unit_loss,
                b_crit=point.b_crit * unit,
                interval=(low * side.unit_tokens, high * side.unit_tokens),
                s_min=point.s_min if shown else math.nan,
                e_min=math.nan if point.free_shape else point.tradeoff.e_min * unit,
            )
            if row not in found:
                found.append(row)
    return found


def _notes(sides: list[Side], pairs: list[Pair]) -> list[str]:
    notes = []
    texts = {side.corpus.get("sha256") for side in sides if side.corpus}
    if len(texts) > 1:
        notes.append("the scans read different text: their losses don't mean the same")
    if any(not side.corpus for side in sides):
        notes.append("tables don't say their text and tokenizer: they are taken to be the same")
    untuned = [side.name for side in sides if not all(side.table.tuned)]
    if untuned:
        notes.append(
            f"in {', '.join(untuned)} some best learning rates are at the edge of those tried: better ones may exist"
        )
    for pair in pairs:
        savings = [row for row in pair.batches if math.isfinite(row.mean_interval[0])]
        if len(savings) > 1 and savings[-1].mean_interval[0] > savings[0].mean_interval[1]:
            notes.append(f"{pair.names[1]} saves more at large batches than at small ones ({pair.models[1]})")
        if len(savings) > 1 and savings[-1].mean_interval[1] < savings[0].mean_interval[0]:
            notes.append(f"{pair.names[1]} saves less at large batches than at small ones ({pair.models[1]})")
    return notes
