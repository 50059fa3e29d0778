"""A packed corpus in words: its counts, and a few of its rows as text."""

import numpy as np

from scaling_jax.data.corpus import SPLITS, Corpus, corpus_tokenizer, open_corpus
from scaling_jax.data.packing import corpus_folder, look_up
from scaling_jax.data.tokenizers import bpe_vocabulary
from scaling_jax.errors import UserError


def inspect(source: str, context: int, tokenizer: str = "bytes", rows: int = 3) -> str:
    """Counts of a packed corpus, all of its checksums compared, and `rows` rows of each split, from all over it.

    Raises:
      UserError: if it isn't packed yet, or was cut or altered.
    """
    bpe_vocabulary(tokenizer)
    for name, value in (("context", context), ("rows", rows)):
        if value < 1:
            raise UserError(f"{name} = {value} must be positive")
    folder = corpus_folder(look_up(source).text, tokenizer)
    if not (folder / "manifest.json").exists():
        raise UserError(
            f"{source} isn't packed as {tokenizer} yet: scaling-jax data prepare '{source}' --tokenizer {tokenizer}"
        )
    corpus = open_corpus(folder, context, check=True)
    lines = [f"{folder}: all checksums match", *summary(corpus)]
    packed_by = corpus_tokenizer(folder, corpus.manifest)
    for split, rows_RxT1 in zip(SPLITS, (corpus.train_RxT1, corpus.test_RxT1), strict=True):
        for number in np.linspace(0, len(rows_RxT1) - 1, min(rows, len(rows_RxT1))).astype(int):
            lines.append(f"{split} row {number:,}: {packed_by.decode(rows_RxT1[number])!r}")
    return "\n".join(lines)


def summary(corpus: Corpus) -> list[str]:
    """What was packed, a line each."""
    m = corpus.manifest
    lines = [
        f"{m['source']}: {m['files']:,} files, {m['bytes']:,} bytes, sha256 {m['sha256'][:16]}",
        f"tokenizer {m['tokenizer']}: {m['vocab_size']:,} ids, sha256 {m['tokenizer_sha256'][:16]}, "
        f"{m['test_bytes_per_token']:.3f} bytes per test token",
        f"held out: {m['held_out']}",
    ]
    for split, rows_RxT1 in zip(SPLITS, (corpus.train_RxT1, corpus.test_RxT1), strict=True):
        lines.append(
            f"{split}: {m['documents'][split]:,} documents, {m['text_bytes'][split]:,} bytes, "
            f"{m['tokens'][split]:,} tokens, {len(rows_RxT1):,} rows of {m['context']}"
        )
    return lines
