"""A run's folder: config.json, metrics.jsonl (a line an evaluation), result.json (last, so its presence means done)."""

import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

from scaling_jax.config import read_config, to_dict
from scaling_jax.errors import UserError

Status = Literal["reached", "exhausted", "given up", "diverged"]
_DAMAGE = (ValueError, TypeError, KeyError, RecursionError)  # what reading something else raises


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended; its losses are in `metrics.jsonl`."""

    run_id: str
    status: Status
    steps: int
    tokens: int
    test_loss: float | None  # the last one, nats per token; None if it wasn't finite
    corpus_sha256: str


def write_atomically(path: Path, text: str) -> None:
    """Either the old file or all of the new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_run_config(folder: Path) -> dict[str, Any]:
    """A run's config.json: {"run": its values, "corpus": the manifest of its text}.

    Raises:
      UserError: if it isn't there or is damaged.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        if not (isinstance(config["run"], dict) and isinstance(config["corpus"], dict)):
            raise ValueError("no run or corpus")
    except (OSError, *_DAMAGE) as error:
        raise UserError(f"{path} is damaged ({error}): {_train_again(folder)}") from None
    return config


def read_result(folder: Path) -> RunResult | None:
    """None while the run isn't done.

    Raises:
      UserError: if it is damaged or of another version.
    """
    path = folder / "result.json"
    return read_config(RunResult, path, _train_again(folder)) if path.exists() else None


def write_result(folder: Path, result: RunResult) -> None:
    write_json(folder / "result.json", to_dict(result))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Evaluations in order; a last line that was cut off by a crash is not one.

    Raises:
      UserError: naming a line before it that isn't what a run writes.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            lines.append(_checked(json.loads(text)))
        except _DAMAGE as error:
            raise UserError(f"{path} line {number} is damaged ({error}): {_train_again(folder)}") from None
    return lines


def _checked(line: Any) -> dict[str, Any]:
    loss = line.get("test_loss") if isinstance(line, dict) else None
    if not isinstance(line, dict) or not isinstance(line["step"], int) or not isinstance(loss, float | int | None):
        raise ValueError("not an evaluation")
    for name in ("small_sq_norm", "big_sq_norm"):
        if not all(isinstance(x, float | int | None) for x in line.get(name, ())):
            raise ValueError(f"{name} isn't a list of numbers")
    return line


def _train_again(folder: Path) -> str:
    return f"remove {folder}, and the same scan or training command trains it again"


def keep_metrics_until(folder: Path, step: int) -> None:
    """Drops evaluations after `step`: a run resumed from there writes them again."""
    write_metrics(folder, [line for line in read_metrics(folder) if line["step"] <= step])


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def append_clock(folder: Path, step: int) -> None:
    """When a step was evaluated; apart from the metrics, which are the same whenever a run is trained."""
    with (folder / "clock.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": round(time.time(), 3)}) + "\n")


def read_timed_metrics(folder: Path) -> list[dict[str, Any]]:
    """Like `read_metrics`, with "time" (seconds since 1970) in the lines of which it is known."""
    path = folder / "clock.jsonl"
    times = {}
    for text in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        with contextlib.suppress(*_DAMAGE):  # only displays need it: a damaged line is none
            entry = json.loads(text)
            times[entry["step"]] = {"time": float(entry["time"])}
    return [line | times.get(line["step"], {}) for line in read_metrics(folder)]


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def jsonable(value: float) -> float | None:
    """Eight digits hold a float32; JSON has no NaN."""
    return float(f"{value:.8g}") if math.isfinite(value) else None
