"""A run's folder: config.json, metrics.jsonl (a line an evaluation), result.json (last, so its presence means done)."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

from scaling_jax.config import from_dict, to_dict

Status = Literal["reached", "exhausted", "given up", "diverged"]


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


def read_result(folder: Path) -> RunResult | None:
    """None while the run isn't done."""
    path = folder / "result.json"
    return from_dict(RunResult, json.loads(path.read_text())) if path.exists() else None


def write_result(folder: Path, result: RunResult) -> None:
    write_json(folder / "result.json", to_dict(result))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Evaluations in order; a last line that was cut off by a crash is not one."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


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
    seen = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    times = {entry["step"]: {"time": entry["time"]} for entry in seen}
    return [line | times.get(line["step"], {}) for line in read_metrics(folder)]


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def jsonable(value: float) -> float | None:
    """Eight digits hold a float32; JSON has no NaN."""
    return float(f"{value:.8g}") if math.isfinite(value) else None
