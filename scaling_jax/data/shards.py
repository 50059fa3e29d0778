"""Packs shards of a source into token files, in this process or in workers; trains the BPE tokenizer in a worker.

The files of a shard depend only on the shard and the tokenizer, not on the process.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scaling_jax.data.corpus import SPLITS, token_dtype
from scaling_jax.data.sources import Part, Shard
from scaling_jax.data.text_files import Piece, read_lines, read_text
from scaling_jax.data.token_documents import read_tokens
from scaling_jax.data.tokenizers import Tokenizer, bpe_vocabulary, load_tokenizer, train_bpe
from scaling_jax.io import UserError
from scaling_jax.io.files import whole_file, write_json, write_whole
from scaling_jax.io.workers import Command, Message, run_jobs, serve

BPE_TRAINING_CHARACTERS = 256 << 20  # at most; the same number from each shard's train split

_BATCH = 1 << 20  # characters encoded at once
_START = "import sys; from scaling_jax.data.shards import main; main(*sys.argv[1:])"
_TRAIN = -1  # in place of a shard's number


def read(shard: Shard) -> Iterator[Piece]:
    """The documents of a shard in order; long documents come in pieces.

    Raises:
      UserError: if a file, a line or a record isn't text. Names it.
    """
    for part in shard:
        yield from _reader(part.kind)(part)


def pack_shard(shard: Shard, tokenizer: Tokenizer, work: Path, number: int) -> None:
    """Writes a shard's tokens to `<number>.train` and `.test`, then its counts to `<number>.json`.

    A separator token follows each document.

    Raises:
      UserError, OSError: if the text can't be read or the tokens can't be written. There is then no `.json`.
    """
    with contextlib.ExitStack() as files:
        paths = [work / f"{number:05}.{split}" for split in SPLITS]
        streams = [_Stream(files.enter_context(whole_file(path)), tokenizer) for path in paths]
        if shard and shard[0].kind == "tokens":
            for part in shard:
                for held_out, tokens, documents in read_tokens(part, tokenizer.vocab_size, tokenizer.separator):
                    streams[held_out].add_tokens(tokens, documents)
        else:
            add = [stream.add for stream in streams]  # there are so many short documents that look-ups cost time
            for held_out, text, last in read(shard):
                add[held_out](text, last)
        counts = {split: stream.finish() for split, stream in zip(SPLITS, streams, strict=True)}
    write_json(work / f"{number:05}.json", counts)


def shard_counts(work: Path, number: int) -> dict | None:
    """The counts that `pack_shard` wrote for a shard; None if the shard isn't finished."""
    path = work / f"{number:05}.json"
    return json.loads(path.read_text()) if path.exists() else None


def pack_in_workers(
    shards: dict[int, Shard], tokenizer: str, work: Path, workers: int, on_done: Callable[[int], None]
) -> None:
    """Packs `{number: shard}` in worker processes. Calls `on_done` with the number of each finished shard.

    Raises:
      UserError: if a worker raised it, or a worker died.
      OSError: if a worker couldn't write.
    """
    jobs = [[number, shard] for number, shard in shards.items()]
    _in_workers(jobs, tokenizer, work, workers, lambda job: on_done(job[0]))


def train_in_worker(shards: list[Shard], tokenizer: str, work: Path) -> None:
    """Trains a tokenizer on the shards' train split and writes `tokenizer.json`. An interrupt leaves no file.

    Raises:
      UserError, OSError: see `pack_in_workers`.
    """
    _in_workers([[_TRAIN, shards]], tokenizer, work, 1, lambda _: None)


def main(work: str, tokenizer_name: str) -> None:
    """The main function of a worker process."""
    tokenizers: list[Tokenizer] = []

    def do(job: list, send: Callable[[Message], None]) -> bool:
        number, shards = job
        if number == _TRAIN:
            _write_tokenizer([_as_shard(shard) for shard in shards], tokenizer_name, Path(work))
            return True
        if not tokenizers:
            tokenizers.append(load_tokenizer(tokenizer_name, Path(work)))
        pack_shard(_as_shard(shards), tokenizers[0], Path(work), number)
        return True

    serve(do, on_end=lambda: os._exit(0))


class _Stream:
    """Writes the tokens of one split of a shard to a file, batch by batch."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer):
        self._file, self._tokenizer = file, tokenizer
        self._digest = hashlib.sha256()
        self._tokens = self._bytes = self._documents = 0
        self._waiting: list[str] = []
        self._is_last: list[bool] = []
        self._characters = 0

    def add(self, text: str, last: bool) -> None:
        """Adds a piece of a document; `last` is True for the document's last piece."""
        self._waiting.append(text)
        self._is_last.append(last)
        self._characters += len(text) + 1
        if self._characters >= _BATCH:
            self._write()

    def add_tokens(self, tokens: np.ndarray, documents: int) -> None:
        """Adds tokens, with their separators. `documents` end in them."""
        data = tokens.astype(token_dtype(self._tokenizer.vocab_size), copy=False)
        self._file.write(data.data)
        self._digest.update(data.data)
        self._tokens += len(data)
        self._documents += documents

    def _write(self) -> None:
        tokens, lengths = self._tokenizer.encode(self._waiting)
        ends = np.cumsum(lengths)[np.array(self._is_last, bool)]
        self.add_tokens(np.insert(tokens, ends, self._tokenizer.separator), len(ends))
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


def _as_shard(values: list) -> Shard:
    """A shard from its JSON values."""
    return [Part(*value) for value in values]


def _reader(kind: str):
    if kind == "tfds":
        from scaling_jax.data.tfds_text import read_records  # takes seconds

        return read_records
    if kind == "tokens":
        raise UserError("text 'tokens:…' is tokens already: give a source of text")
    return read_text if kind == "text" else read_lines


def _in_workers(jobs: list[Any], tokenizer: str, work: Path, workers: int, on_done: Callable[[Any], None]) -> None:
    command = Command(("-c", _START, str(work), tokenizer))
    run_jobs(jobs, [command] * workers, on_done=on_done)


def _write_tokenizer(shards: list[Shard], name: str, work: Path) -> None:
    """Trains `bpe:<vocabulary>` on the shards' train split and writes `work/tokenizer.json`, whole or not at all."""
    vocabulary = bpe_vocabulary(name)
    assert vocabulary is not None
    write_whole(work / "tokenizer.json", train_bpe(_train_texts(shards), vocabulary))


def _train_texts(shards: list[Shard]) -> Iterator[str]:
    for shard in shards:
        left = BPE_TRAINING_CHARACTERS // len(shards)
        for piece in read(shard):
            if left <= 0:
                break
            if not piece.held_out:
                yield piece.text[:left]
                left -= len(piece.text)
