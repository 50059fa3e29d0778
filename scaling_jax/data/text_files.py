"""Documents from files on this machine: plain text and JSON lines, also compressed by gzip or zstd.

A file may come from somebody else. So memory doesn't grow with it: decompression streams, a JSON line has at most
`LONGEST_LINE` bytes, and text that is `MOST_EXPANSION` times as large as its file is refused.
"""

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

LONGEST_LINE = 1 << 26  # bytes
MOST_EXPANSION = 250  # bytes of text per compressed byte; web text has 3 to 10, program output up to 100
_ALWAYS_TAKEN = 1 << 28  # bytes of text; below, a file is small enough whatever its expansion
_PIECE = 1 << 20  # characters
_COMPRESSED_PIECE = 512  # bytes. Four bytes of zstd may hold 128 KiB of text, so this may hold 16 MiB


class Piece(NamedTuple):
    """The text of a document, or a part of it. A part of a long document ends at the end of a line, where possible."""

    held_out: bool
    text: str
    last: bool  # True for the last piece of a document


def read_text(part: Part) -> Iterator[Piece]:
    """The file as one document. Python sources have the encoding that they declare; other files are UTF-8.

    Line ends become \\n. An empty file is an empty document.

    Raises:
      UserError: if the file isn't text in that encoding, or expands too far.
    """
    path, held_out = Path(part.path), bool(part.held_out)
    size = _Size(path)
    try:
        with tokenize.open(path) if path.suffix == ".py" else io.TextIOWrapper(_open(path), "utf-8") as file:
            waiting = file.read(_PIECE)
            while more := file.read(_PIECE):
                size.add(len(more))
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
      UserError: if a line isn't JSON in UTF-8, is too long, or has no text in the field; if the file expands too far.
        Names the line.
    """
    path, number = Path(part.path), 0
    size = _Size(path)
    try:
        with _open(path) as file:
            if part.start:
                file.seek(part.start - 1)
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):  # of the line before
                    pass
            while (part.stop is None or file.tell() < part.stop) and (line := file.readline(LONGEST_LINE + 1)):
                number += 1
                size.add(len(line))
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"the line has more than {LONGEST_LINE >> 20} MiB: divide the document")
                if not line.isspace():
                    text = _field(line, part.field)
                    yield Piece(is_test(text), text, last=True)
    except _CUT as error:
        raise UserError(f"{path} can't be decompressed ({error}): it is cut off or damaged, get it again") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}, line {_lines_before(part) + number}: {error}") from None


def _field(line: bytes, field: str) -> str:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}): convert it") from None
    except (json.JSONDecodeError, RecursionError) as error:
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
    lines, left = 1, part.start - 1
    with open(part.path, "rb") as file:
        while block := file.read(min(left, _PIECE)):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines


class _Size:
    """Counts the text of a file, and refuses a file that a few bytes make very large."""

    def __init__(self, path: Path):
        self._path, self._file_bytes, self._text_bytes = path, path.stat().st_size, 0

    def add(self, text_bytes: int) -> None:
        self._text_bytes += text_bytes
        if self._text_bytes > max(_ALWAYS_TAKEN, MOST_EXPANSION * self._file_bytes):
            raise UserError(
                f"{self._path} has {self._file_bytes:,} bytes but expands to more than {self._text_bytes:,}: leave it "
                f"out of --text, or decompress it yourself (text may be {MOST_EXPANSION} times as large as its file)"
            )


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
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(_COMPRESSED_PIECE)
            if not self._compressed:
                if self._inside:
                    raise _CutZstd("the last frame has no end")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
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
