"""Files: text, JSON and CSV written whole or not at all; JSON lines appended, read, and followed while they grow."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

try:
    from orjson import loads as parse_json  # eight times as fast
except ImportError:  # orjson isn't installed
    from json import loads as parse_json  # type: ignore[assignment]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write. It replaces `path` once it is complete and on disk; after an error it is deleted.

    Until then its name is `.<name>.<process>.unfinished`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    file = unfinished.open("wb")
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):  # on a full disk, the rest of the buffer can't be written
            file.close()
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that `path` always holds the whole old or the whole new content. Text is in UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON. Raises ValueError for NaN and infinity, which JSON doesn't have."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_rows(path: Path, kind: type[NamedTuple], rows: Sequence[NamedTuple]) -> None:
    """Writes CSV: a header with the fields of `kind`, then a line per row. Floats have ten digits; NaN is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(kind._fields)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_whole(path, text.getvalue())


def as_json(value: Any) -> str:
    """Indented JSON of any value. Named tuples and dataclasses become objects; NaN and infinity become null."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def append_line(path: Path, value: Any) -> None:
    """Appends a JSON line. Closes the file each time, so that other machines see the line at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    if not path.is_dir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        return
    with contextlib.suppress(OSError):  # not every system can open or wait for a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes a file of JSON lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(value) + "\n" for value in values))


def read_lines(path: Path, on_line: Callable[[bytes], object] = lambda _: None) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each complete line. Leaves out a last line without a line end, cut off by a crash.

    Args:
      on_line: called with every line, also with such a last one.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            on_line(line)
            if line.endswith(b"\n"):
                yield number, line


class Tail:
    """The JSON lines that a file gains from now on, or from its start. If the file shrinks, reads it from its start."""

    def __init__(self, path: Path, from_start: bool = False):
        self.path = path
        self._read = 0 if from_start or not path.exists() else path.stat().st_size

    def new(self) -> list[Any]:
        """The lines added since the last call. Raises ValueError for a line that isn't JSON."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self._read:
                self._read = 0
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return [parse_json(line) for line in whole.splitlines()]


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.10g}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
