"""A line of metrics.jsonl, and the course of a whole run: the columns of its lines."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_NORMS = ("small_sq_norm", "big_sq_norm")
_NORMS_BY_PART = ("small_sq_norm_by_layer", "big_sq_norm_by_layer")
_LARGEST = 1e100  # losses and norms come from float32; far larger values overflow in products
_NUMBERS = {float, int, type(None)}


class SquaredNorms(NamedTuple):
    """Squared norms of the gradient that another trainer measured, in one step or as means over some steps."""

    small_batch: int  # in the unit of the run's batch, and smaller
    small_sq_norm: float  # mean over small batches
    big_sq_norm: float  # of the whole batch


@dataclasses.dataclass(frozen=True, eq=False)
class MetricsLine:
    """A line of metrics.jsonl: one call of the compiled program, with some steps and maybe an evaluation at the end.

    Losses are in nats per token; losses that weren't finite are NaN. Batches are in tokens; all steps of a line have
    one batch size. Norms are of the gradient before clipping. Norms by part of the model (`tasks.part_names`) are means
    over the line's steps.
    """

    step: int  # the last step of the line
    tokens: int  # processed up to this step
    epoch: float
    batch_tokens: int
    small_batch_tokens: int
    train_loss: np.ndarray  # [steps]
    small_sq_norm: np.ndarray  # [steps]
    big_sq_norm: np.ndarray  # [steps]
    small_sq_norm_by_part: np.ndarray | None  # [parts]; None if not measured
    big_sq_norm_by_part: np.ndarray | None  # [parts]; None if not measured
    live: np.ndarray | None  # the measurement of a live ramp's metric, see `live_ramp.measure`
    evaluated: bool
    test_loss: float  # NaN also without an evaluation
    test_bits_per_byte: float | None
    told_steps: int | None = None  # the line's steps, if another trainer told it, which has no series of them

    @property
    def num_steps(self) -> int:
        return len(self.train_loss) if self.told_steps is None else self.told_steps

    @classmethod
    def read(cls, values: Any) -> "MetricsLine":
        """A line from its JSON values.

        Raises:
          ValueError, TypeError, KeyError: if the values don't form a line.
        """
        if not isinstance(values, dict):
            raise ValueError("not an object")
        counts = [_count(values, name) for name in ("step", "tokens", "batch_tokens", "small_batch_tokens")]
        train_loss = _numbers(values, "train_loss")
        norms = [_numbers(values, name) for name in _NORMS]
        told_steps = _count(values, "num_steps") if "num_steps" in values else None
        length = len(train_loss) if told_steps is None else min(len(norms[0]), 1)  # of a told line: one measurement
        if any(len(norm) != length for norm in norms):
            raise ValueError("train_loss, small_sq_norm and big_sq_norm differ in length")
        loss = values.get("test_loss")
        if loss is not None and (
            isinstance(loss, bool) or not isinstance(loss, float | int) or not 0 < loss < _LARGEST
        ):
            raise ValueError(f"test_loss = {loss!r} isn't a positive number")
        epoch, bits = values.get("epoch"), values.get("test_bits_per_byte")
        step, tokens, batch_tokens, small_batch_tokens = counts
        by_part = [_numbers(values, name) if name in values else None for name in (*_NORMS_BY_PART, "live")]
        return cls(
            step=step,
            tokens=tokens,
            epoch=math.nan if epoch is None else float(epoch),
            batch_tokens=batch_tokens,
            small_batch_tokens=small_batch_tokens,
            train_loss=train_loss,
            small_sq_norm=norms[0],
            big_sq_norm=norms[1],
            small_sq_norm_by_part=by_part[0],
            big_sq_norm_by_part=by_part[1],
            live=by_part[2],
            evaluated="test_loss" in values,
            test_loss=math.nan if loss is None else float(loss),
            test_bits_per_byte=None if bits is None else float(bits),
            told_steps=told_steps,
        )

    def json(self) -> dict[str, Any]:
        """The JSON values that `read` takes. NaN becomes null, because JSON has no NaN."""
        values: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "epoch": jsonable(self.epoch),
            "batch_tokens": self.batch_tokens,
            "small_batch_tokens": self.small_batch_tokens,
            "train_loss": _nulls(self.train_loss),
        }
        arrays = (self.small_sq_norm, self.big_sq_norm, self.small_sq_norm_by_part, self.big_sq_norm_by_part, self.live)
        for name, array in zip((*_NORMS, *_NORMS_BY_PART, "live"), arrays, strict=True):
            if array is not None:
                values[name] = _nulls(array)
        if self.evaluated:
            values["test_loss"] = None if math.isnan(self.test_loss) else self.test_loss
        if self.test_bits_per_byte is not None:
            values["test_bits_per_byte"] = self.test_bits_per_byte
        if self.told_steps is not None:
            values["num_steps"] = self.told_steps
        return values

    @classmethod
    def told(
        cls, before: int, step: int, batch_tokens: int, test_loss: float, norms: SquaredNorms | None = None
    ) -> "MetricsLine":
        """The line of another trainer's evaluation after `step`, and the steps since the one after step `before`."""
        small, small_sq_norm, big_sq_norm = norms or (batch_tokens, None, None)
        return cls(
            step=step,
            tokens=step * batch_tokens,
            epoch=math.nan,
            batch_tokens=batch_tokens,
            small_batch_tokens=small,
            train_loss=np.zeros(0),
            small_sq_norm=np.array([] if small_sq_norm is None else [small_sq_norm], float),
            big_sq_norm=np.array([] if big_sq_norm is None else [big_sq_norm], float),
            small_sq_norm_by_part=None,
            big_sq_norm_by_part=None,
            live=None,
            evaluated=True,
            test_loss=test_loss if math.isfinite(test_loss) else math.nan,
            test_bits_per_byte=None,
            told_steps=step - before,
        )


class Course(NamedTuple):
    """The metrics of a whole run as columns: by measured step, by line and by evaluation.

    Every step is measured. Of lines that another trainer told, one step at most is.
    """

    step: np.ndarray  # [measured]
    tokens: np.ndarray  # [measured], processed up to the step
    batch_tokens: np.ndarray  # [measured]
    small_batch_tokens: np.ndarray  # [measured]
    small_sq_norm: np.ndarray  # [measured]
    big_sq_norm: np.ndarray  # [measured]
    line_steps: np.ndarray  # [lines], number of steps in each line
    line_batch_tokens: np.ndarray  # [lines]
    line_small_batch_tokens: np.ndarray  # [lines]
    small_sq_norm_by_part: np.ndarray | None  # [lines, parts]; None unless all lines have them
    big_sq_norm_by_part: np.ndarray | None  # [lines, parts]; None unless all lines have them
    eval_steps: np.ndarray  # [evaluations]; only evaluations with a finite loss
    eval_tokens: np.ndarray  # [evaluations]
    eval_losses: np.ndarray  # [evaluations]


def course(lines: Sequence[MetricsLine]) -> Course:
    """The columns of a run's lines. Each step has the batch sizes of its line."""
    steps = np.array([line.num_steps for line in lines], int)
    measured = np.array([len(line.small_sq_norm) for line in lines], int)
    before_end = np.repeat(np.cumsum(measured), measured) - np.arange(1, measured.sum() + 1)  # of its line
    batch, small_batch = (
        np.array([getattr(line, name) for line in lines], float) for name in ("batch_tokens", "small_batch_tokens")
    )
    small, big = (np.concatenate([getattr(line, name) for line in lines] or [np.zeros(0)]) for name in _NORMS)
    by_part = [[getattr(line, f"{size}_by_part") for line in lines] for size in _NORMS]
    complete = bool(lines) and all(norms is not None for of_size in by_part for norms in of_size)
    evaluations = [line for line in lines if line.evaluated and math.isfinite(line.test_loss)]
    return Course(
        step=np.repeat(np.array([line.step for line in lines], int), measured) - before_end,
        tokens=np.repeat(np.array([line.tokens for line in lines], float), measured)
        - before_end * np.repeat(batch, measured),
        batch_tokens=np.repeat(batch, measured),
        small_batch_tokens=np.repeat(small_batch, measured),
        small_sq_norm=small,
        big_sq_norm=big,
        line_steps=steps,
        line_batch_tokens=batch,
        line_small_batch_tokens=small_batch,
        small_sq_norm_by_part=np.array(by_part[0]) if complete else None,
        big_sq_norm_by_part=np.array(by_part[1]) if complete else None,
        eval_steps=np.array([line.step for line in evaluations], int),
        eval_tokens=np.array([line.tokens for line in evaluations], int),
        eval_losses=np.array([line.test_loss for line in evaluations], float),
    )


def joined(pieces: Sequence[Course]) -> Course:
    """The course of a run from those of its pieces, in order."""
    if not pieces:
        return course([])
    return Course(*map(_joined, zip(*pieces, strict=True)))  # type: ignore[arg-type]


def _joined(columns: Sequence[np.ndarray | None]) -> np.ndarray | None:
    return None if any(c is None for c in columns) else np.concatenate(columns)  # type: ignore[arg-type]


def jsonable(value: float) -> float | None:
    """The value with eight digits, enough for a float32; None for NaN and infinity, which JSON doesn't have."""
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _count(values: dict[str, Any], name: str) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
        raise ValueError(f"{name} = {value!r} isn't a positive whole number")
    return value


def _numbers(values: dict[str, Any], name: str) -> np.ndarray:
    listed = values[name]
    if not isinstance(listed, list) or not set(map(type, listed)) <= _NUMBERS:
        raise ValueError(f"{name} isn't a list of numbers")
    numbers = np.array(listed, float)  # None becomes NaN
    if (largest := np.fmax.reduce(np.abs(numbers), initial=0.0)) > _LARGEST:
        raise ValueError(f"{name} has a value of {largest:.3g}")
    return numbers


def _nulls(array: np.ndarray) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in array.tolist()]
