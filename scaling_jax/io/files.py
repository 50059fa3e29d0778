"""Files: text, JSON and CSV written whole or not at all; JSON lines appended, read, and followed while they grow.

A results folder may come from somebody else. So only plain files are read and written: no pipes, no devices. Writing
never follows a link and never replaces one; reading follows links to plain files. A results folder may itself be a
link, but the folders in it that this package writes to may not.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from scaling_jax.io import UserError

try:
    from orjson import loads as parse_json  # eight times as fast
except ImportError:  # orjson isn't installed
    from json import loads as parse_json  # type: ignore[assignment]


LARGEST_BYTES = 1 << 28  # of a file that is read at once; ours have a few MB at most
LONGEST_LINE = 1 << 26  # bytes of a line of JSON
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # starts of a cell that spreadsheets take for a formula
_NOT_PLAIN = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def open_plain(path: Path, mode: str = "rb", **options: Any) -> IO[Any]:
    """`path.open(mode)` for plain files alone. Never waits for the other end of a pipe.

    Raises:
      UserError: if there is something else at `path`. To a mode that writes, a link is something else too.
      OSError: as `path.open` does.
    """
    reads = mode.startswith("r")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _check_plain(path, path.stat() if reads else path.lstat())
    further = getattr(os, "O_NONBLOCK", 0) | (0 if reads else getattr(os, "O_NOFOLLOW", 0))
    with contextlib.ExitStack() as unless_plain:
        opener = lambda name, flags: os.open(name, flags | further, 0o666)  # noqa: E731
        file = unless_plain.enter_context(open(path, mode, opener=opener, **options))
        _check_plain(path, os.fstat(file.fileno()))  # another process may have put something else there
        unless_plain.pop_all()
    return file


def read_whole(path: Path, largest: int = LARGEST_BYTES) -> bytes:
    """The content of a plain file.

    Raises:
      UserError: if it isn't a plain file, or has more than `largest` bytes.
      OSError: if it can't be read.
    """
    with open_plain(path) as file:
        too_large = os.fstat(file.fileno()).st_size > largest
        content = b"" if too_large else file.read()  # read(n) would first get n bytes of memory
    if too_large:
        raise UserError(f"{path} has more than {largest >> 20} MiB: this can't be a file of this kind, give another")
    return content


def refuse_links(*folders: Path) -> None:
    """Raises UserError if one of these folders inside a results folder is a link, because files would go elsewhere."""
    for folder in folders:
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link, so results would go elsewhere: put a folder there; only a whole results folder "
                "may be a link"
            )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write. It replaces `path` once it is complete and on disk; after an error it is deleted.

    Until then its name is `.<name>.<process>.unfinished`; threads have names of their own.

    Raises:
      UserError: if `path` is a link, a folder, a device or a pipe.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        _check_plain(path, path.lstat())
    here = threading.current_thread()
    writer = f"{os.getpid()}" if here is threading.main_thread() else f"{os.getpid()}-{here.native_id}"
    unfinished = path.with_name(f".{path.name}.{writer}.unfinished")
    unfinished.unlink(missing_ok=True)  # of a process that was killed
    file = unfinished.open("xb")  # x: a link that appears here isn't followed
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
    """Writes a file so that `path` always holds the whole old or the whole new content. Text is in UTF-8.

    What UTF-8 can't hold, such as bytes of other names of folders, is written as an escape.
    """
    with whole_file(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON. Raises ValueError for NaN and infinity, which JSON doesn't have."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_rows(path: Path, kind: type[NamedTuple], rows: Sequence[NamedTuple]) -> None:
    """Writes CSV: a header with the fields of `kind`, then a line per row. Floats have ten digits; NaN is empty.

    Text that a spreadsheet would run as a formula gets an apostrophe in front; `cell_text` removes it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(kind._fields)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_whole(path, text.getvalue())


def cell_text(cell: str) -> str:
    """The text of a CSV cell as it was before `write_rows` wrote it."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def as_json(value: Any) -> str:
    """Indented JSON of any value. Named tuples and dataclasses become objects; NaN and infinity become null."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def append_line(path: Path, value: Any) -> None:
    """Appends a JSON line. Closes the file each time, so that other machines see the line at once."""
    with open_plain(path, "a", encoding="utf-8") as file:
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

    Raises:
      UserError: if it isn't a plain file, or a line is longer than `LONGEST_LINE`.
    """
    if not path.exists():
        return
    with open_plain(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            on_line(line)
            if line.endswith(b"\n"):
                yield number, line
            elif len(line) == LONGEST_LINE:
                raise UserError(f"{path} line {number} has more than {LONGEST_LINE >> 20} MiB: the file is damaged")


class Tail:
    """The JSON lines that a file gains from now on, or from its start. If the file shrinks, reads it from its start."""

    def __init__(self, path: Path, from_start: bool = False):
        self.path = path
        self._read = 0 if from_start or not path.exists() else path.stat().st_size

    def new(self) -> list[Any]:
        """The lines added since the last call. Raises ValueError for a line that isn't JSON."""
        if not self.path.exists():
            return []
        with open_plain(self.path) as file:
            if self.path.stat().st_size < self._read:
                self._read = 0
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return [parse_json(line) for line in whole.splitlines()]


def _check_plain(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = _NOT_PLAIN.get(stat.S_IFMT(found.st_mode), "a device")
        raise UserError(f"{path} is {what}, not a plain file: remove it, or give the path of a file")


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
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
    if hasattr(value, "tolist"):  # an array or scalar of numpy, which this module needn't import
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
