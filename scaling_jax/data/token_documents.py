"""The documents in files of tokens, and which of them are held out.

Documents are what Megatron's index lists, or what stands between separators. Where neither is known, a document is a
block of `BLOCK` tokens. A file whose name says that it is for validation is held out; if there is none, one document in
ten is, by the hash of its tokens, so that equal documents are on one side.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.data.sources import MOST_SHARDS, SHARD_BYTES, Document, Part, Shard, in_ten
from scaling_jax.data.token_files import TokenFile, open_tokens
from scaling_jax.io import UserError

BLOCK = 4_096  # tokens
_LONGEST = 1 << 26  # tokens of a document between separators
_AT_ONCE = 1 << 20  # tokens
_VALIDATION = {"val", "valid", "validation", "test"}


class Tokens(NamedTuple):
    """Some documents of one split."""

    held_out: bool
    tokens: np.ndarray  # with a separator after each document, if there is one
    documents: int


def held_out_files(documents: Sequence[Document]) -> set[str]:
    """Names of the files that are for validation; none if all are, because then nothing would be left to train on."""
    files = [document.name for document in documents if document.path.suffix != ".idx"]
    chosen = {name for name in files if _VALIDATION & set(re.split(r"[^a-z]+", name.lower()))}
    return chosen if len(chosen) < len(files) else set()


def token_shards(documents: Sequence[Document]) -> list[Shard]:
    """Shards of the files: ranges of tokens, or of Megatron's documents.

    Raises:
      UserError: if a file isn't one of tokens.
    """
    chosen = held_out_files(documents)
    found = [(document, open_tokens(document.path)) for document in documents if document.path.suffix != ".idx"]
    shard_bytes = max(SHARD_BYTES, -(-sum(file.tokens.nbytes for _, file in found) // MOST_SHARDS))
    shards = []
    for document, file in found:
        count = len(file.tokens) if file.offsets is None else len(file.offsets)
        step = max(1, count * shard_bytes // file.tokens.nbytes)
        if file.offsets is None:
            step += -step % BLOCK
        held_out = document.name in chosen if chosen else None
        path = str(document.path.absolute())
        shards += [[Part("tokens", path, held_out, k, min(k + step, count))] for k in range(0, count, step)]
    return shards


def held_out_rule(shards: Sequence[Shard], separator: int) -> str:
    """What is held out, in words."""
    parts = [part for shard in shards for part in shard]
    if any(part.held_out for part in parts):
        names = sorted({Path(part.path).name for part in parts if part.held_out})
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"the files named for it: {', '.join(names[:3])}{more}"
    if separator >= 0 or all(Path(part.path).with_suffix(".idx").exists() for part in parts):
        return "one document in ten, by the hash of its tokens"
    return f"one block of {BLOCK:,} tokens in ten, by the hash of its tokens, as nothing says where documents end"


def ids_in(documents: Sequence[Document]) -> str:
    """`ids:…` of the tokenizer that made these files, where their formats say it.

    Raises:
      UserError: if they don't, or name several tokenizers.
    """
    files = [document.path for document in documents if document.path.suffix != ".idx"]
    said = {open_tokens(path, check=False).ids for path in files}
    if len(said) == 1 and (ids := said.pop()) is not None:
        return ids
    highest = max(int(open_tokens(path, check=False).tokens[:_AT_ONCE].max()) for path in files)
    raise UserError(
        f"{files[0]} doesn't say which tokenizer made its ids (up to {highest:,} at its start): give --tokenizer gpt2, "
        "the path of a tokenizer.json or .model, or ids:<vocabulary>[,<id that ends a document>], such as "
        f"ids:{highest + 1}"
    )


def read_tokens(part: Part, vocab_size: int, separator: int) -> Iterator[Tokens]:
    """The documents that start in the part's range, about `_AT_ONCE` tokens of one split at a time, without empty ones.

    Args:
      separator: the id that ends documents; -1 if none.

    Raises:
      UserError: if a token isn't in the vocabulary, or a document between separators has no end.
    """
    path = Path(part.path)
    file = open_tokens(path, check=False)
    tokens = file.tokens.view(np.ndarray)  # still mapped; slices of a memmap take three times as long
    waiting: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    lengths, counts = [0, 0], [0, 0]
    end = np.array([] if separator < 0 else [separator], np.uint32)

    def ready(side: int) -> Tokens:
        whole = Tokens(bool(side), np.concatenate(waiting[side]), counts[side])
        waiting[side].clear()
        lengths[side] = counts[side] = 0
        return whole

    for start, stop in _spans(file, part, separator):
        pieces = [tokens[k : min(k + _AT_ONCE, stop)] for k in range(start, stop, _AT_ONCE)]
        for piece in pieces:
            _check(piece, path, vocab_size)
        side = int(_is_test(pieces) if part.held_out is None else part.held_out)
        for piece in pieces:
            waiting[side].append(piece)
            lengths[side] += len(piece)
            if lengths[side] >= _AT_ONCE:
                yield ready(side)
        waiting[side].append(end)
        counts[side] += 1
    for side in (0, 1):
        if waiting[side]:
            yield ready(side)


def _spans(file: TokenFile, part: Part, separator: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each document that starts in the part's range, without separators. None is empty."""
    stop = part.stop or 0
    spans: Iterable[tuple[int, int]]
    if file.offsets is not None:
        starts = file.document_starts(part.start, stop).tolist()
        spans = ((a, b - int(b > a and file.tokens[b - 1] == separator)) for a, b in itertools.pairwise(starts))
    elif separator < 0:
        spans = ((k, min(k + BLOCK, len(file.tokens))) for k in range(part.start, stop, BLOCK))
    else:
        spans = _between_separators(file.tokens, part, separator)
    return ((start, stop) for start, stop in spans if stop > start)


def _between_separators(tokens: np.ndarray, part: Part, separator: int) -> Iterator[tuple[int, int]]:
    """Start and stop of what stands between separators. What starts in the range ends in it, or after it."""
    stop = part.stop or 0
    start = part.start if part.start == 0 else None  # None: the rest of a document that started before the range
    at = max(part.start - 1, 0)
    while at < len(tokens):
        window = tokens[at : at + _AT_ONCE]
        for end in (np.flatnonzero(window == separator) + at).tolist():
            if start is not None:
                yield start, end
            start = end + 1
            if start >= stop:
                return
        at += len(window)
        if start is None and at >= stop:
            return
        if start is not None and at - start > _LONGEST:
            raise UserError(
                f"{part.path} has no id {separator} in {_LONGEST:,} tokens from token {start:,} on: give the id that "
                "ends documents, --tokenizer ids:<vocabulary>,<id>, or ids:<vocabulary> for none"
            )
    if start is not None:
        yield start, len(tokens)


def _check(tokens: np.ndarray, path: Path, vocab_size: int) -> None:
    for found in (int(tokens.max()), 0 if tokens.dtype.kind == "u" else int(tokens.min())):
        if not 0 <= found < vocab_size:
            raise UserError(
                f"{path} has the id {found:,}, but its tokenizer's ids are 0 to {vocab_size - 1:,}: give another "
                "--tokenizer, or other files"
            )


def _is_test(pieces: Sequence[np.ndarray]) -> bool:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.astype("<u4").data)  # equal tokens have equal hashes in files of any type
    return in_ten(digest)
