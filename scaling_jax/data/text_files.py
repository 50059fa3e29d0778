"""Documents from files on this machine: plain text and JSON lines, also compressed by gzip or zstd."""

import gzip
import io
import json
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scaling_jax.data.sources import Part, is_test
from scaling_jax.io import UserError

_PIECE = 1 << 20  # characters


class Piece(NamedTuple):
    """The text of a document, or a part of it. A part of a long document ends at the end of a line, where possible."""

    held_out: bool
    text: str
    last: bool  # True for the last piece of a document


def read_text(part: Part) -> Iterator[Piece]:
    """The file as one document. Python sources have the encoding that they declare; other files are UTF-8.

    Line ends become \\n. An empty file is an empty document.

    Raises:
      UserError: if the file isn't text in that encoding.
    """
    path, held_out = Path(part.path), bool(part.held_out)
    try:
        with tokenize.open(path) if path.suffix == ".py" else io.TextIOWrapper(_open(path), "utf-8") as file:
            waiting = file.read(_PIECE)
            while more := file.read(_PIECE):
                cut = waiting.rfind("\n") + 1 or len(waiting)
                yield Piece(held_out, waiting[:cut], last=False)
                waiting = waiting[cut:] + more
            yield Piece(held_out, waiting, last=True)
    except (UnicodeDecodeError, SyntaxError) as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it or leave it out of --text") from None
    except _CUT as error:
        raise UserError(f"{path} can't be decompressed ({error}): it is cut off or damaged, get it again") from None


def read_lines(part: Part) -> Iterator[Piece]:
    """One document per JSON line that starts in the part's range: the text of its field. Skips blank lines.

    Raises:
      UserError: if a line isn't JSON in UTF-8, or has no text in the field. Names the line.
    """
    path, number = Path(part.path), 0
    try:
        with _open(path) as file:
            if part.start:
                file.seek(part.start - 1)
                file.readline()  # the rest of the line before
            while (part.stop is None or file.tell() < part.stop) and (line := file.readline()):
                number += 1
                if not line.isspace():
                    text = _field(line, part.field)
                    yield Piece(is_test(text), text, last=True)
    except _CUT as error:
        raise UserError(f"{path} can't be decompressed ({error}): it is cut off or damaged, get it again") from None
    except ValueError as error:
        raise UserError(f"{path}, line {_lines_before(part) + number}: {error}") from None


def _field(line: bytes, field: str) -> str:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}): convert it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}): the file may be cut off; get it again") from None
    text = values.get(field) if isinstance(values, dict) else None
    if isinstance(text, str):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"not UTF-8 text ({error}): convert it") from None
        return text
    if not isinstance(values, dict):
        raise ValueError(f"not a JSON object with a text field {field!r}")
    if field in values:
        raise ValueError(f"field {field!r} holds {type(text).__name__}, not text")
    known = ", ".join(key for key, value in values.items() if isinstance(value, str)) or "none"
    raise ValueError(f"no field {field!r}; text fields here: {known} (choose one with files:<glob>#<field>)")


def _lines_before(part: Part) -> int:
    if not part.start:
        return 0
    with open(part.path, "rb") as file:
        return file.read(part.start - 1).count(b"\n") + 1


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(path), 1 << 20)  # type: ignore[return-value]
    return path.open("rb")


class _CutZstd(Exception):
    pass


class _ZstdReader(io.RawIOBase):
    """Reads all frames of a zstd file. Unlike the library's readers, raises an error if the last frame is cut off."""

    def __init__(self, path: Path):
        import zstandard

        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame = self._new_frame()
        self._inside = False  # True between the start and the end of a frame
        self._compressed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(1 << 17)
            if not self._compressed:
                if self._inside:
                    raise _CutZstd("the last frame has no end")
                return 0
            try:
                self._ready = self._frame.decompress(self._compressed)
            except self._error as error:
                raise _CutZstd(str(error)) from None
            self._inside, self._compressed = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = self._new_frame()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


_CUT = (gzip.BadGzipFile, EOFError, zlib.error, _CutZstd)
