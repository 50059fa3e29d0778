"""The files in a run's folder: config.json, metrics.jsonl (one line per call), and result.json.

result.json is written last, so a folder with it holds a finished run. Each file has a dataclass, one writer and one
reader here. config.json holds the `SCHEMA` with which it was written. All older schemas stay readable:

1: config.json has no schema, and the run id hashes all values of the run.
2: the run id hashes only values that differ from their defaults.
"""

import dataclasses
import glob
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict, read_config, to_dict
from scaling_jax.io.files import append_line, parse_json, read_lines, read_whole, write_json, write_lines
from scaling_jax.training.run import Run

SCHEMA = 2
Status = Literal["reached", "exhausted", "given up", "diverged"]

_NORMS = ("small_sq_norm", "big_sq_norm")
_NORMS_BY_PART = ("small_sq_norm_by_layer", "big_sq_norm_by_layer")
_PIECE = 10_000  # lines of metrics.jsonl that are in memory at a time
_LARGEST = 1e100  # losses and norms come from float32; far larger values overflow in products
_NUMBERS = {float, int, type(None)}
_DAMAGE = (ValueError, TypeError, KeyError, RecursionError, OverflowError)  # raised by reading damaged values


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run's config.json: the run and its text."""

    run: Run
    corpus: dict[str, Any]  # the manifest of the text
    schema: int = SCHEMA


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A run's result.json: how the run ended. Its losses are in metrics.jsonl."""

    run_id: str
    status: Status
    steps: int
    tokens: int
    test_loss: float | None  # the last one, nats per token; None if it wasn't finite
    corpus_sha256: str


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

    @property
    def num_steps(self) -> int:
        return len(self.train_loss)

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
        if any(len(norm) != len(train_loss) for norm in norms):
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
        return values


class Course(NamedTuple):
    """The metrics of a whole run as columns: by step, by line and by evaluation."""

    batch_tokens: np.ndarray  # [steps]
    small_batch_tokens: np.ndarray  # [steps]
    small_sq_norm: np.ndarray  # [steps]
    big_sq_norm: np.ndarray  # [steps]
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
    batch, small_batch = (
        np.array([getattr(line, name) for line in lines], float) for name in ("batch_tokens", "small_batch_tokens")
    )
    small, big = (np.concatenate([getattr(line, name) for line in lines] or [np.zeros(0)]) for name in _NORMS)
    by_part = [[getattr(line, f"{size}_by_part") for line in lines] for size in _NORMS]
    complete = bool(lines) and all(norms is not None for of_size in by_part for norms in of_size)
    evaluations = [line for line in lines if line.evaluated and math.isfinite(line.test_loss)]
    return Course(
        batch_tokens=np.repeat(batch, steps),
        small_batch_tokens=np.repeat(small_batch, steps),
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


def run_folder(workdir: str | Path, run: Run) -> Path:
    """The folder of a run in a results folder: the one whose config.json holds this run, else a new one."""
    runs = Path(workdir) / "runs"
    new = runs / run.run_id
    # With another schema or other defaults, the same run has another id, and another run may have the same id.
    for folder in (new, *sorted(runs.glob(f"{glob.escape(run.label)}-*"))):
        try:
            if read_run_config(folder).run == run:
                return folder
        except UserError:  # an empty or damaged folder; a new run may use it
            continue
        if folder == new:
            new = _free(runs, run)
    return new


def write_run_config(folder: Path, run: Run, corpus: dict[str, Any]) -> None:
    write_json(folder / "config.json", {"schema": SCHEMA, "run": to_dict(run), "corpus": corpus})


def read_run_config(folder: Path) -> RunConfig:
    """The config.json in a run's folder. Values that are missing get their defaults.

    Raises:
      UserError: if the file isn't there, is damaged, or is from a later version.
    """
    path = folder / "config.json"
    try:
        values = json.loads(read_whole(path))
        schema = values.get("schema", 1)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ValueError(f"schema {schema} is from a later version; this version reads up to {SCHEMA}")
        if not isinstance(values["corpus"], dict):
            raise ValueError("no corpus")
        return RunConfig(from_dict(Run, values["run"]), values["corpus"], schema)
    except (OSError, AttributeError, *_DAMAGE) as error:  # UserError is a ValueError
        raise UserError(f"{path} is damaged ({error}): {_train_again(folder)}") from None


def read_result(folder: Path) -> RunResult | None:
    """The result of a run; None if the run isn't done.

    Raises:
      UserError: if the file is damaged or from another version.
    """
    path = folder / "result.json"
    return read_config(RunResult, path, _train_again(folder)) if path.exists() else None


def write_result(folder: Path, result: RunResult) -> None:
    write_json(folder / "result.json", to_dict(result))


def read_metrics(folder: Path, result: RunResult | None = None) -> list[MetricsLine]:
    """A run's metrics lines in order, without a last line that a crash cut off.

    Args:
      result: of a finished run; its last step must be the last step of the lines.

    Raises:
      UserError: if a line is damaged, or the lines and the result disagree. Names the line or both steps.
    """
    return list(_each_line(folder, result))


def read_course(folder: Path, result: RunResult | None = None) -> Course:
    """The columns of `read_metrics`, read in pieces, because lines take far more memory. Raises what it raises."""
    lines, pieces = _each_line(folder, result), []
    while piece := list(itertools.islice(lines, _PIECE)):
        pieces.append(course(piece))
    return course([]) if not pieces else Course(*map(_joined, zip(*pieces, strict=True)))  # type: ignore[arg-type]


def _joined(columns: Sequence[np.ndarray | None]) -> np.ndarray | None:
    return None if any(c is None for c in columns) else np.concatenate(columns)  # type: ignore[arg-type]


def _each_line(folder: Path, result: RunResult | None) -> Iterator[MetricsLine]:
    path = folder / "metrics.jsonl"
    last = 0
    num_parts: set[int] = set()
    for number, text in read_lines(path):
        try:
            line = MetricsLine.read(parse_json(text))
            if line.step - line.num_steps != last:
                raise ValueError(f"{line.num_steps} steps up to step {line.step} don't follow the line before")
            num_parts |= {len(x) for x in (line.small_sq_norm_by_part, line.big_sq_norm_by_part) if x is not None}
            if len(num_parts) > 1:
                raise ValueError(
                    f"lines have norms of {min(num_parts)} and of {max(num_parts)} parts of the model in one run"
                )
        except _DAMAGE as error:
            raise UserError(f"{path} line {number} is damaged ({error}): {_train_again(folder)}") from None
        last = line.step
        yield line
    if result is not None and last != result.steps:
        raise UserError(
            f"{path} ends at step {last:,} but the run ended at step {result.steps:,}: {_train_again(folder)}"
        )


def append_metrics(folder: Path, line: MetricsLine) -> None:
    append_line(folder / "metrics.jsonl", line.json())


def write_metrics(folder: Path, lines: Sequence[MetricsLine]) -> None:
    write_lines(folder / "metrics.jsonl", [line.json() for line in lines])


def append_clock(folder: Path, step: int) -> None:
    """Notes the time of an evaluation in clock.jsonl. metrics.jsonl has no times, so that it is the same every time."""
    append_line(folder / "clock.jsonl", {"step": step, "time": round(time.time(), 3)})


def read_clock(folder: Path) -> dict[int, float]:
    """{step: time in seconds since 1970} of the evaluations, for display. Skips damaged lines."""
    times = {}
    for _, text in read_lines(folder / "clock.jsonl"):
        try:
            entry = json.loads(text)
            times[int(entry["step"])] = float(entry["time"])
        except _DAMAGE:
            continue
    return times


def jsonable(value: float) -> float | None:
    """The value with eight digits, enough for a float32; None for NaN and infinity, which JSON doesn't have."""
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _free(runs: Path, run: Run) -> Path:
    """A new folder for a run, if the folder with its id holds another run."""
    names = (runs / f"{run.run_id}-{count}" for count in itertools.count(2))
    return next(folder for folder in names if not (folder / "config.json").exists())


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
    if np.any(np.abs(numbers) > _LARGEST):
        raise ValueError(f"{name} has a value of {np.nanmax(np.abs(numbers)):.3g}")
    return numbers


def _nulls(array: np.ndarray) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in array.tolist()]


def _train_again(folder: Path) -> str:
    return f"remove {folder}, then the same scan or train command trains it again"
