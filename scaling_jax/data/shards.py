"""One shard of a source into token files, by whichever process: what is written depends on the shard alone."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scaling_jax.data.sources import Part, Shard
from scaling_jax.data.text_files import Piece, read_lines, read_text
from scaling_jax.data.tokenizers import Tokenizer

_BATCH = 1 << 20  # characters that are encoded at once


def read(shard: Shard) -> Iterator[Piece]:
    """The documents of a shard, in order, long ones in pieces.

    Raises:
      UserError: naming the file and line, or record, that isn't text.
    """
    for part in shard:
        yield from _reader(part.kind)(part)


def pack_shard(shard: Shard, tokenizer: Tokenizer, work: Path, number: int) -> None:
    """Writes `<number>.train` and `.test`, tokens with a separator after each document, then `.json` about them.

    Raises:
      UserError, OSError: if the text can't be read or the tokens can't be written; then there is no `.json`.
    """
    streams = {
        held_out: _Stream(work / f"{number:05}.{split}") for held_out, split in ((False, "train"), (True, "test"))
    }
    waiting: dict[bool, list[Piece]] = {False: [], True: []}
    characters = {False: 0, True: 0}
    try:
        for piece in read(shard):
            split = piece.held_out
            waiting[split].append(piece)
            characters[split] += len(piece.text) + 1
            if characters[split] >= _BATCH:
                streams[split].write(waiting[split], tokenizer)
                waiting[split], characters[split] = [], 0
        counts = {}
        for split, stream in streams.items():
            stream.write(waiting[split], tokenizer)
            counts[stream.path.suffix[1:]] = stream.finish()
        write_synced(work / f"{number:05}.json", json.dumps(counts).encode())
    finally:
        for stream in streams.values():
            stream.discard()


def shard_counts(work: Path, number: int) -> dict | None:
    """What `pack_shard` wrote about a shard; None if it didn't finish."""
    path = work / f"{number:05}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_synced(path: Path, content: bytes) -> None:
    """Either no file or all of it."""
    unfinished = unfinished_name(path)
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def unfinished_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.unfinished")


class _Stream:
    """A split's tokens of one shard on their way to disk."""

    def __init__(self, path: Path):
        self.path = path
        self._file = unfinished_name(path).open("wb")
        self._digest = hashlib.sha256()
        self._tokens = self._bytes = self._documents = 0

    def write(self, pieces: list[Piece], tokenizer: Tokenizer) -> None:
        if not pieces:
            return
        texts = [piece.text for piece in pieces]
        tokens, lengths = tokenizer.encode(texts)
        ends = np.cumsum(lengths)[np.array([piece.last for piece in pieces])]
        dtype = token_dtype(tokenizer)
        data = np.insert(tokens, ends, tokenizer.separator).astype(dtype, copy=False)
        self._file.write(data.data)
        self._digest.update(data.data)
        self._tokens += len(data)
        self._documents += len(ends)
        self._bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)

    def finish(self) -> dict:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._file.name, self.path)
        return {
            "tokens": self._tokens,
            "text_bytes": self._bytes,
            "documents": self._documents,
            "sha256": self._digest.hexdigest(),
        }

    def discard(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
                self._file.close()
            os.unlink(self._file.name)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _reader(kind: str):
    if kind == "tfds":
        from scaling_jax.data.tfds_text import read_records  # seconds to import

        return read_records
    return read_text if kind == "text" else read_lines


def as_shard(values: list) -> Shard:
    """A shard that went through JSON."""
    return [Part(*value) for value in values]
