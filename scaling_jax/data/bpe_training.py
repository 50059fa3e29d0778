"""A BPE trained on a source's own text."""

from collections.abc import Iterator
from pathlib import Path

from scaling_jax.data.shards import read, write_synced
from scaling_jax.data.sources import Shard
from scaling_jax.data.tokenizers import bpe_vocabulary, train_bpe

BPE_TRAINING_CHARACTERS = 256 << 20  # at most, taken evenly from all over the train split


def write_tokenizer(shards: list[Shard], name: str, work: Path) -> None:
    """`work/tokenizer.json`, all of it or none, of `bpe:<vocabulary>` trained on the shards' train split."""
    vocabulary = bpe_vocabulary(name)
    assert vocabulary is not None
    write_synced(work / "tokenizer.json", train_bpe(_texts(shards), vocabulary).encode())


def _texts(shards: list[Shard]) -> Iterator[str]:
    for shard in shards:
        left = BPE_TRAINING_CHARACTERS // len(shards)
        for piece in read(shard):
            if left <= 0:
                break
            if not piece.held_out:
                yield piece.text[:left]
                left -= len(piece.text)
