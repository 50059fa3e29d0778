"""Packs a source into a corpus in the cache folder, with all cores; it can be stopped and resumed at any moment."""

import errno
import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.data.corpus import (
    FORMAT,
    SPLITS,
    Corpus,
    corpus_folder,
    corpus_tokenizer,
    look_up,
    manifest_sha256,
    open_corpus,
    token_dtype,
)
from scaling_jax.data.shards import pack_in_workers, pack_shard, shard_counts, train_in_worker
from scaling_jax.data.sources import Source
from scaling_jax.data.tokenizers import Tokenizer, bpe_vocabulary, load_tokenizer
from scaling_jax.io import UserError
from scaling_jax.io.files import whole_file, write_json
from scaling_jax.io.locks import locked
from scaling_jax.io.workers import available_cores


class PackProgress(NamedTuple):
    """Progress of packing."""

    phase: str  # what is being done, in words
    done: int  # shards
    total: int  # shards


OnProgress = Callable[[PackProgress], None]


def prepare(
    source: str,
    context: int,
    tokenizer: str | None = None,
    *,
    workers: int | None = None,
    check: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> Corpus:
    """The corpus of a source. Packs it, unless the same text was packed before with this tokenizer, for any context.

    Args:
      source: `python`, `files:<glob>[#field]` or `tfds:<name>[/<config>][#field]`.
      context: tokens per row.
      tokenizer: `bytes` (the default), `gpt2`, or `bpe:<vocabulary>`, which is trained on the source's train split.
      workers: number of processes that pack; None takes one per core.
      check: if the corpus was packed before, compare the checksums of large files too, which takes long.

    Raises:
      UserError: if the source can't be read, is too small to split and pack, or the packed corpus is damaged.
    """
    tokenizer = tokenizer or "bytes"
    bpe_vocabulary(tokenizer)  # refuses an unknown tokenizer before reading anything
    if context < 1:
        raise UserError(f"context = {context} must be at least 1 token per row")
    if workers is not None and workers < 1:
        raise UserError(f"workers = {workers} must be at least 1 process")
    found = look_up(source)
    folder = corpus_folder(found.text, tokenizer)
    if not (folder / "manifest.json").exists() or _work_folder(folder).exists():
        try:
            _pack(found, tokenizer, folder, workers, on_progress)
        except OSError as error:
            raise UserError(_what_stopped(error, folder)) from None
    return open_corpus(folder, context, check)


def inspect(source: str, context: int, tokenizer: str = "bytes", rows: int = 3) -> str:
    """Text with the counts of a packed corpus and `rows` rows of each split, evenly spaced. Compares all checksums.

    Raises:
      UserError: if the corpus isn't packed yet, or a file was cut off or changed.
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
    """Lines that describe a packed corpus."""
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


def _pack(found: Source, name: str, folder: Path, workers: int | None, on_progress: OnProgress) -> None:
    work = _work_folder(folder)
    work.mkdir(parents=True, exist_ok=True)
    lock = locked(work.with_suffix(".lock"), f"the text in {folder}", seconds=math.inf, wait=True)
    with lock:  # a second process waits here and then finds the corpus packed
        if (folder / "manifest.json").exists():  # another process packed it meanwhile, or died before it cleaned up
            shutil.rmtree(work, ignore_errors=True)
            return
        work.mkdir(exist_ok=True)
        for leftover in work.glob("*.unfinished"):
            leftover.unlink()
        if found.text.source == "python":
            from scaling_jax.data.text_builder import embedded_shards  # takes seconds; needed only to pack

            found = found._replace(shards=embedded_shards())
        total = len(found.shards)
        tokenizer = _tokenizer(found, name, work, on_progress)
        missing = [n for n in range(total) if shard_counts(work, n) is None]
        on_progress(PackProgress("packing", total - len(missing), total))
        done = itertools.count(total - len(missing) + 1)
        _pack_shards(
            found,
            missing,
            tokenizer,
            work,
            workers,
            lambda _: on_progress(PackProgress("packing", next(done), total)),
        )
        if not found.text.source.startswith("tfds:") and look_up(found.text.source).text != found.text:
            shutil.rmtree(work)
            raise UserError(f"--text {found.text.source} changed while it was packed: run the same command again")
        _join(found, tokenizer, work, on_progress)
        shutil.rmtree(folder, ignore_errors=True)  # of a folder that lost its manifest
        os.replace(work / "whole", folder)
        shutil.rmtree(work)


def _pack_shards(
    found: Source,
    missing: list[int],
    tokenizer: Tokenizer,
    work: Path,
    workers: int | None,
    on_done: Callable[[int], None],
) -> None:
    workers = min(workers or len(available_cores()), len(missing))
    if workers > 1:
        pack_in_workers({n: found.shards[n] for n in missing}, tokenizer.name, work, workers, on_done)
        return
    for number in missing:
        pack_shard(found.shards[number], tokenizer, work, number)
        on_done(number)


def _tokenizer(found: Source, name: str, work: Path, on_progress: OnProgress) -> Tokenizer:
    if bpe_vocabulary(name) is not None and not (work / "tokenizer.json").exists():
        on_progress(PackProgress("training the tokenizer", 0, 1))
        train_in_worker(found.shards, name, work)
    return load_tokenizer(name, work)


def _join(found: Source, tokenizer: Tokenizer, work: Path, on_progress: OnProgress) -> None:
    """Writes `work/whole`: the tokens of all shards end to end, and the manifest."""
    shutil.rmtree(work / "whole", ignore_errors=True)
    whole = work / "whole"
    whole.mkdir()
    total = len(found.shards)
    counts = [shard_counts(work, n) or {} for n in range(total)]
    checksums = {}
    for split in SPLITS:
        expected = [count[split]["sha256"] for count in counts]
        paths = [work / f"{n:05}.{split}" for n in range(total)]
        checksums[f"{split}.tokens"] = _concatenate(paths, expected, whole / f"{split}.tokens")
    if (work / "tokenizer.json").exists():
        checksums["tokenizer.json"] = _concatenate(
            [work / "tokenizer.json"], [tokenizer.sha256], whole / "tokenizer.json"
        )

    def sums(key: str) -> dict[str, int]:
        return {split: sum(count[split][key] for count in counts) for split in SPLITS}

    manifest = {
        "format": FORMAT,
        **found.text._asdict(),
        "held_out": found.held_out,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "documents": sums("documents"),
        "text_bytes": sums("text_bytes"),
        "tokens": sums("tokens"),  # with the separators
        "test_bytes_per_token": sums("text_bytes")["test"] / max(1, sums("tokens")["test"]),
        "checksums": checksums,
    }
    write_json(whole / "manifest.json", manifest | {"manifest_sha256": manifest_sha256(manifest)})


def _concatenate(paths: Iterable[Path], expected: Iterable[str], target: Path) -> dict:
    whole = hashlib.sha256()
    with whole_file(target) as out:
        for path, sha256 in zip(paths, expected, strict=True):
            part = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    out.write(block)
                    part.update(block)
                    whole.update(block)
            if part.hexdigest() != sha256:
                raise UserError(
                    f"{path} was changed after it was packed: remove {path.parent} and run the same command again"
                )
    return {"bytes": target.stat().st_size, "sha256": whole.hexdigest()}


def _work_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


def _what_stopped(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left to pack text in {folder.parent}: free some space or set SCALING_JAX_CACHE to another disk, "
            "then run the same command again to continue"
        )
    return f"can't pack text in {folder.parent} ({error}): set SCALING_JAX_CACHE to a folder that you can write to"
