"""Processes that pack shards, one a core, and one that trains a tokenizer: Ctrl-C can't reach into a library's loops.

The end of a worker's input ends it at once: what it was at is done again.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scaling_jax.data.shards import as_shard, pack_shard, read
from scaling_jax.data.sources import Shard
from scaling_jax.data.tokenizers import Tokenizer, bpe_vocabulary, load_tokenizer, train_bpe
from scaling_jax.io.files import write_whole
from scaling_jax.io.workers import Command, Message, run_jobs, serve

BPE_TRAINING_CHARACTERS = 256 << 20  # at most, taken evenly from all over the train split

_START = "import sys; from scaling_jax.data.pack_workers import main; main(*sys.argv[1:])"
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
