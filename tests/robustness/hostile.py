"""Hostile but well-formed files for a results folder: each is one file of it with one value that can't be."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.io.files import write_rows
from scaling_jax.results.branches import BranchMeasurement
from scaling_jax.scanning import Cell, Experiment, LearningRates, Subject
from scaling_jax.tasks import ModelConfig
from scaling_jax.training.records import MetricsLine
from tests.made_up_scan import b_crit, s_min, write_run, write_scan

NUMBERS = (
    -1,
    0,
    1,
    3,
    0.5,
    -1e308,
    1e308,
    1e-308,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
)
OTHERS = (None, True, "", "x", "1", "\ud800", "[/b]\x1b[31m", "../..", [], [None], ["x"], [1], [[1]], {}, {"x": 1})
CELLS = ("", " ", "nan", "inf", "-1", "0", "1e308", "1e-308", "9" * 400, "x", "\x1b[31m[/b]", "0x1", "1_0", "٣", "True")
MISSING = object()


class Hostile(NamedTuple):
    """A file of a results folder with other bytes."""

    name: str  # of the file below the folder
    where: str  # the value that is changed
    content: bytes


def small_scan(folder: Path) -> Experiment:
    """Writes a finished scan of one small model with every kind of file that commands read."""
    subject = Subject(ModelConfig(1, 16, 1), (3.0, 2.6, 2.3), LearningRates(1e-2, 1_000, most=3, search="grid"))
    experiment = Experiment("small", (subject,), (128, 512, 2_048, 4_096, 8_192), 100_000_000)
    losses = np.geomspace(4, 2.2, 30)

    def train(run):
        steps = s_min(losses) * (1 + b_crit(losses) / run.batch_tokens) * (1 + 0.1 * (run.learning_rate > 6e-3))
        lines, last = [], 0
        for loss, step in zip(losses.tolist(), steps.astype(int).tolist(), strict=True):
            if step <= last:
                continue
            ones, parts = [1.0] * (step - last), [1.0, 2.0, 1.0]
            line = {"step": step, "tokens": step * run.batch_tokens, "epoch": 0.5, "test_loss": loss}
            line |= {"batch_tokens": run.batch_tokens, "small_batch_tokens": run.model.context, "train_loss": ones}
            line |= {"small_sq_norm": [3.0] * len(ones), "big_sq_norm": ones, "test_bits_per_byte": 2.0}
            line |= {"small_sq_norm_by_layer": parts, "big_sq_norm_by_layer": parts}
            lines.append(MetricsLine.read(line))
            last = step
        return write_run(folder, run, lines, "reached")

    write_scan(folder, experiment, train)
    branch = BranchMeasurement("1x16", 128, 0, 1_000, 2.6, 500.0, 400.0, 600.0, tolerance=0.01)
    write_rows(folder / "branches.csv", BranchMeasurement, [branch])
    for run in (folder / "runs").iterdir():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        clock = [json.dumps({"step": line["step"], "time": 1e9 + line["step"]}) for line in lines]
        (run / "clock.jsonl").write_text("\n".join([*clock, ""]))
    return experiment


def hostile_files(folder: Path) -> Iterator[Hostile]:
    """Every file of a scan's folder with each of its values changed to each that can't be."""
    runs = sorted((folder / "runs").iterdir())
    first = runs[0].relative_to(folder)
    for name in ("experiment.json", f"cells/{Cell('1x16', 128, 0).file_name}.json", *(first / n for n in _OBJECTS)):
        yield from _changed_objects(folder, str(name))
    for name in ("metrics.jsonl", "clock.jsonl"):
        yield from _changed_lines(folder, str(first / name))
    for name in ("measurements.csv", "branches.csv"):
        if (folder / name).exists():
            yield from _changed_cells(folder, name)


_OBJECTS = ("config.json", "result.json")


def _changed_objects(folder: Path, name: str) -> Iterator[Hostile]:
    values = json.loads((folder / name).read_text())
    sha256 = values.pop("sha256", None)  # or it would be all that readers look at
    if sha256 is not None:
        for other in (*NUMBERS, *OTHERS):
            yield Hostile(name, f"sha256 = {_said(other)}", _json({**values, "sha256": other}))
    for place in _places(values):
        for other in (*NUMBERS, *OTHERS, MISSING):
            yield Hostile(name, f"{_path(place)} = {_said(other)}", _json(_with(values, place, other)))
    for other in (*NUMBERS, *OTHERS):
        yield Hostile(name, f"all = {_said(other)}", _json(other))
    yield Hostile(name, "another key", _json({**values, "\ud800\x1b[31m": 1}))


def _changed_lines(folder: Path, name: str) -> Iterator[Hostile]:
    lines = (folder / name).read_bytes().splitlines()
    for number in (0, len(lines) // 2, len(lines) - 1):
        values = json.loads(lines[number])
        places = [place for place in _places(values) if len(place) < 2 or place[1] == 0]
        for place in places:
            for other in (*NUMBERS, *OTHERS, MISSING):
                line = _json(_with(values, place, other))
                where = f"line {number + 1} {_path(place)} = {_said(other)}"
                yield Hostile(name, where, b"\n".join([*lines[:number], line, *lines[number + 1 :], b""]))
        for other in (*NUMBERS, *OTHERS):
            where = f"line {number + 1} = {_said(other)}"
            yield Hostile(name, where, b"\n".join([*lines[:number], _json(other), *lines[number + 1 :], b""]))
    yield Hostile(name, "lines that fall", b"\n".join([*lines[::-1], b""]))
    yield Hostile(name, "a line twice", b"\n".join([lines[0], *lines, b""]))


def _changed_cells(folder: Path, name: str) -> Iterator[Hostile]:
    rows = [line.split(",") for line in (folder / name).read_text().splitlines()]
    for row in {0, 1, len(rows) - 1}:
        for column in range(len(rows[0])):
            for cell in CELLS:
                changed = [list(one) for one in rows]
                changed[row][column] = cell
                text = "\n".join(",".join(one) for one in changed)
                yield Hostile(name, f"line {row + 1} column {rows[0][column]} = {cell[:12]!r}", f"{text}\n".encode())


def _places(values: Any, before: tuple = ()) -> Iterator[tuple]:
    """The place of every value in JSON, as keys and indices; of a list, only its first and last item."""
    if isinstance(values, dict):
        inside = list(values)
    else:
        inside = sorted({0, len(values) - 1}) if isinstance(values, list) and values else []
    for key in inside:
        yield (*before, key)
        yield from _places(values[key], (*before, key))


def _with(values: Any, place: tuple, other: Any) -> Any:
    copied = dict(values) if isinstance(values, dict) else list(values)
    key, *rest = place
    if rest:
        copied[key] = _with(values[key], tuple(rest), other)
    elif other is MISSING:
        del copied[key]
    else:
        copied[key] = other
    return copied


def _path(place: tuple) -> str:
    return ".".join(map(str, place))


def _said(other: Any) -> str:
    return "missing" if other is MISSING else repr(other)[:20]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
