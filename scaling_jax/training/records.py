"""The files in a run's folder: config.json, metrics.jsonl (one line per call), and result.json.

result.json is written last, so a folder with it holds a finished run. Each file has a dataclass, one writer and one
reader here. config.json holds the `SCHEMA` with which it was written. All older schemas stay readable:

1: config.json has no schema, and the run id hashes all values of the run.
2: the run id hashes only values that differ from their defaults.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict, to_dict
from scaling_jax.io.files import (
    append_line,
    parse_json,
    read_lines,
    read_whole,
    to_disk,
    write_json,
    write_lines,
    write_whole,
)
from scaling_jax.training.integrity import disagreement, file_sha256, is_finite, records_checksum
from scaling_jax.training.metrics import Course, MetricsLine, course, joined
from scaling_jax.training.run import Run

SCHEMA = 2
Status = Literal["reached", "exhausted", "given up", "diverged"]

_PIECE = 10_000  # lines of metrics.jsonl that are in memory at a time
_DAMAGE = (ValueError, TypeError, KeyError, RecursionError, OverflowError)  # raised by reading damaged values


class DamagedRecords(UserError):
    """A run's records aren't as the run wrote them. `what` says what is wrong with which file."""

    def __init__(self, what: str, folder: Path):
        super().__init__(f"{what}: remove {folder}, then the same scan or train command trains it again")
        self.what = what


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run's config.json: the run and its text."""

    run: Run
    corpus: dict[str, Any]  # the manifest of the text
    schema: int = SCHEMA
    sha256: str = ""  # of the file


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A run's result.json: how the run ended. Its losses are in metrics.jsonl."""

    run_id: str
    status: Status
    steps: int
    tokens: int
    test_loss: float | None  # the last one, nats per token; None if it wasn't finite
    corpus_sha256: str
    checksum: str | None = None  # of all records, see `integrity.records_checksum`; None in older results


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
    write_whole(folder / "config.json", config_text(run, corpus))


def config_text(run: Run, corpus: dict[str, Any]) -> str:
    """The text of config.json."""
    return json.dumps({"schema": SCHEMA, "run": to_dict(run), "corpus": corpus}, indent=2, allow_nan=False) + "\n"


def read_run_config(folder: Path) -> RunConfig:
    """The config.json in a run's folder. Values that are missing get their defaults.

    Raises:
      UserError: if the file isn't there, is damaged, or is from a later version.
    """
    path = folder / "config.json"
    try:
        content = read_whole(path)
        values = json.loads(content)
        schema = values.get("schema", 1)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ValueError(f"schema {schema} is from a later version; this version reads up to {SCHEMA}")
        if not isinstance(values["corpus"], dict):
            raise ValueError("no corpus")
        sha256 = hashlib.sha256(content).hexdigest()
        return RunConfig(from_dict(Run, values["run"]), values["corpus"], schema, sha256)
    except (OSError, AttributeError, *_DAMAGE) as error:  # UserError is a ValueError
        raise DamagedRecords(f"{path} is damaged ({error})", folder) from None


def read_result(folder: Path) -> RunResult | None:
    """The result of a run; None if the run isn't done. Doesn't look at the other records.

    Raises:
      DamagedRecords: if the file isn't JSON.
      UserError: if its values aren't those of a result; a later version may have written them.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        values = parse_json(read_whole(path))
    except (OSError, *_DAMAGE) as error:
        raise DamagedRecords(f"{path} is damaged ({error})", folder) from None
    try:
        return from_dict(RunResult, values)
    except UserError as error:
        raise UserError(
            f"{path} is from another version, or damaged ({error}): remove {folder}, then the same scan or train "
            "command trains it again"
        ) from None


def whole_result(folder: Path) -> RunResult | None:
    """The result of a run whose other records agree with it; None if the run isn't done.

    Raises:
      DamagedRecords: if they don't agree. Names what differs.
      UserError: see `read_result`.
    """
    result = read_result(folder)
    if result is not None and result.checksum is None:
        for _ in _checked_lines(folder, result, None):
            pass
    elif result is not None:
        files = file_sha256(folder / "config.json"), file_sha256(folder / "metrics.jsonl")
        _check_checksum(folder, result, *files)
    return result


def with_checksum(result: RunResult, run: Run, corpus: dict[str, Any], metrics_sha256: str) -> RunResult:
    """The result with the checksum of all records of its run; they are as this version writes them.

    Args:
      metrics_sha256: of metrics.jsonl, see `integrity.LinesHash`.
    """
    config_sha256 = hashlib.sha256(config_text(run, corpus).encode()).hexdigest()
    return dataclasses.replace(result, checksum=records_checksum(config_sha256, metrics_sha256, to_dict(result)))


def write_result(folder: Path, result: RunResult) -> None:
    write_json(folder / "result.json", to_dict(result))
    to_disk(folder)


def records_to_disk(folder: Path) -> None:
    """Waits until the metrics would survive a power cut. What says that they are complete is written afterwards."""
    to_disk(folder / "metrics.jsonl")
    to_disk(folder)


def read_metrics(folder: Path, result: RunResult | None = None, config_sha256: str | None = None) -> list[MetricsLine]:
    """A run's metrics lines in order, without a last line that a crash cut off.

    Args:
      result: of a finished run; the lines must be all that it wrote.
      config_sha256: of its config.json, if you know it.

    Raises:
      DamagedRecords: if a line is damaged, or the lines and the result disagree. Names the line or what differs.
    """
    return list(_checked_lines(folder, result, config_sha256))


def read_course(folder: Path, result: RunResult | None = None, config_sha256: str | None = None) -> Course:
    """The columns of `read_metrics`, read in pieces, because lines take far more memory. Raises what it raises."""
    lines, pieces = _checked_lines(folder, result, config_sha256), []
    while piece := list(itertools.islice(lines, _PIECE)):
        pieces.append(course(piece))
    return joined(pieces)


def _checked_lines(folder: Path, result: RunResult | None, config_sha256: str | None) -> Iterator[MetricsLine]:
    sha256, last, not_finite = hashlib.sha256(), None, None
    for line in _lines(folder, sha256.update):
        if not_finite is None and not is_finite(line):
            not_finite = line.step
        last = line
        yield line
    if result is not None:
        if (problem := disagreement(last, not_finite, result)) is not None:
            raise DamagedRecords(f"{folder / 'metrics.jsonl'} {problem}", folder)
        config_sha256 = config_sha256 or file_sha256(folder / "config.json")
        _check_checksum(folder, result, config_sha256, sha256.hexdigest())


def whole_lines(folder: Path) -> list[MetricsLine]:
    """The metrics lines of a run that isn't done, up to the first that is damaged."""
    lines = []
    with contextlib.suppress(DamagedRecords):
        for line in _lines(folder):
            lines.append(line)
    return lines


def _lines(folder: Path, on_line: Callable[[bytes], object] = lambda _: None) -> Iterator[MetricsLine]:
    path, before = folder / "metrics.jsonl", (0, 0)
    num_parts: set[int] = set()
    for number, text in read_lines(path, on_line):
        try:
            line = MetricsLine.read(parse_json(text))
            if line.step - line.num_steps != before[0]:
                raise ValueError(f"{line.num_steps} steps up to step {line.step} don't follow the line before")
            if line.tokens - line.num_steps * line.batch_tokens != before[1]:
                raise ValueError(f"tokens = {line.tokens} don't follow the line before")
            num_parts |= {len(x) for x in (line.small_sq_norm_by_part, line.big_sq_norm_by_part) if x is not None}
            if len(num_parts) > 1:
                raise ValueError(
                    f"lines have norms of {min(num_parts)} and of {max(num_parts)} parts of the model in one run"
                )
        except _DAMAGE as error:
            raise DamagedRecords(f"{path} line {number} is damaged ({error})", folder) from None
        before = line.step, line.tokens
        yield line


def _check_checksum(folder: Path, result: RunResult, config_sha256: str, metrics_sha256: str) -> None:
    if result.checksum not in (None, records_checksum(config_sha256, metrics_sha256, to_dict(result))):
        what = "config.json, metrics.jsonl or result.json isn't as the run wrote it (checksum)"
        raise DamagedRecords(f"{folder}: {what}", folder)


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


def _free(runs: Path, run: Run) -> Path:
    """A new folder for a run, if the folder with its id holds another run."""
    names = (runs / f"{run.run_id}-{count}" for count in itertools.count(2))
    return next(folder for folder in names if not (folder / "config.json").exists())
