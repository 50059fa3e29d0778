"""Files of JSON lines: appended by one process, read or followed by others while they grow."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scaling_jax.io.files import write_whole


def append_line(path: Path, value: Any) -> None:
    """Adds a line; the file is closed each time, so that other machines see it at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """The whole file anew, or the old one."""
    write_whole(path, "".join(json.dumps(value) + "\n" for value in values))


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each whole line with its number, from 1; a last line without an end, cut off by a crash, isn't one."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, line


class Tail:
    """Lines that a file gains from now on, or from its start; a file that became shorter is read from its start."""

    def __init__(self, path: Path, from_start: bool = False):
        self.path = path
        self._read = 0 if from_start or not path.exists() else path.stat().st_size

    def new(self) -> list[Any]:
        """What was added since the last call; raises ValueError for a line that isn't JSON."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self._read:
                self._read = 0
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
