"""One shard of a source into token files, by whichever process: what is written depends on the shard alone."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scaling_jax.data.corpus import SPLITS
from scaling_jax.data.sources import Part, Shard
from scaling_jax.data.text_files import Piece, read_lines, read_text
from scaling_jax.data.tokenizers import Tokenizer, bpe_vocabulary, load_tokenizer, train_bpe
from scaling_jax.io.files import whole_file, write_json, write_whole
from scaling_jax.io.workers import Command, Message, run_jobs, serve

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
    with contextlib.ExitStack() as files:
        paths = [work / f"{number:05}.{split}" for split in SPLITS]
        streams = [_Stream(files.enter_context(whole_file(path)), tokenizer) for path in paths]
        add = [stream.add for stream in streams]  # short documents are so many that every look-up tells
        for held_out, text, last in read(shard):
            add[held_out](text, last)
        counts = {split: stream.finish() for split, stream in zip(SPLITS, streams, strict=True)}
    write_json(work / f"{number:05}.json", counts)


def shard_counts(work: Path, number: int) -> dict | None:
    """What `pack_shard` wrote about a shard; None if it didn't finish."""
    path = work / f"{number:05}.json"
    return json.loads(path.read_text()) if path.exists() else None


class _Stream:
    """A split's tokens of one shard on their way to disk."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer):
        self._file, self._tokenizer = file, tokenizer
        self._digest = hashlib.sha256()
        self._tokens = self._bytes = self._documents = 0
        self._waiting: list[str] = []
        self._is_last: list[bool] = []
        self._characters = 0

    def add(self, text: str, last: bool) -> None:
        """A piece of a document."""
        self._waiting.append(text)
        self._is_last.append(last)
        self._characters += len(text) + 1
        if self._characters >= _BATCH:
            self._write()

    def _write(self) -> None:
        tokens, lengths = self._tokenizer.encode(self._waiting)
        ends = np.cumsum(lengths)[np.array(self._is_last, bool)]
        data = np.insert(tokens, ends, self._tokenizer.separator).astype(token_dtype(self._tokenizer), copy=False)
        self._file.write(data.data)
        self._digest.update(data.data)
        self._tokens += len(data)
        self._documents += len(ends)
        self._bytes += _utf8_bytes("".join(self._waiting))
        self._waiting, self._is_last, self._characters = [], [], 0

    def finish(self) -> dict:
        if self._waiting:
            self._write()
        return {
            "tokens": self._tokens,
            "text_bytes": self._bytes,
            "documents": self._documents,
            "sha256": self._digest.hexdigest(),
        }


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


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


BPE_TRAINING_CHARACTERS = 256 << 20  # at most, taken evenly from all over the train split

_START = "import sys; from scaling_jax.data.shards import main; main(*sys.argv[1:])"
_TRAIN = -1  # in place of a shard's number


def train_in_worker(shards: list[Shard], tokenizer: str, work: Path) -> None:
    """Writes `tokenizer.json`, trained on the shards' train split; interrupted, it stops at once and leaves none.

    Raises:
      UserError, OSError: see `pack_in_workers`.
    """
    _in_workers([[_TRAIN, shards]], tokenizer, work, 1, lambda _: None)


def pack_in_workers(
    shards: dict[int, Shard], tokenizer: str, work: Path, workers: int, on_done: Callable[[int], None]
) -> None:
    """Packs shards by number, first come first served; calls `on_done` with each number when it is done.

    Raises:
      UserError: what a worker refused, or that it died.
      OSError: if a worker couldn't write.
    """
    jobs = [[number, shard] for number, shard in shards.items()]
    _in_workers(jobs, tokenizer, work, workers, lambda job: on_done(job[0]))


def write_tokenizer(shards: list[Shard], name: str, work: Path) -> None:
    """`work/tokenizer.json`, all of it or none, of `bpe:<vocabulary>` trained on the shards' train split."""
    vocabulary = bpe_vocabulary(name)
    assert vocabulary is not None
    write_whole(work / "tokenizer.json", train_bpe(_train_texts(shards), vocabulary))


def main(work: str, tokenizer_name: str) -> None:
    """A worker, until its input ends."""
    tokenizers: list[Tokenizer] = []

    def do(job: list, send: Callable[[Message], None]) -> bool:
        number, shards = job
        if number == _TRAIN:
            write_tokenizer([as_shard(shard) for shard in shards], tokenizer_name, Path(work))
            return True
        if not tokenizers:
            tokenizers.append(load_tokenizer(tokenizer_name, Path(work)))
        pack_shard(as_shard(shards), tokenizers[0], Path(work), number)
        return True

    serve(do, on_end=lambda: os._exit(0))


def _in_workers(jobs: list[Any], tokenizer: str, work: Path, workers: int, on_done: Callable[[Any], None]) -> None:
    command = Command(("-c", _START, str(work), tokenizer))
    run_jobs(jobs, [command] * workers, on_done=on_done)


def _train_texts(shards: list[Shard]) -> Iterator[str]:
    for shard in shards:
        left = BPE_TRAINING_CHARACTERS // len(shards)
        for piece in read(shard):
            if left <= 0:
                break
            if not piece.held_out:
                yield piece.text[:left]
                left -= len(piece.text)
