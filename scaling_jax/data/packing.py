"""Packs a source into a corpus in the cache folder, with all cores; it can be stopped and resumed at any moment."""

import dataclasses
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
from scaling_jax.data.sources import Source, find_documents
from scaling_jax.data.token_documents import held_out_rule, ids_in
from scaling_jax.data.tokenizers import (
    GPT2,
    Ids,
    Tokenizer,
    bpe_vocabulary,
    from_file,
    ids_name,
    is_file,
    load_tokenizer,
    most_ids,
    read_tokenizer,
)
from scaling_jax.io import UserError
from scaling_jax.io.files import whole_file, write_json, write_whole
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
      source: `python`, `files:<glob>[#field]`, `tfds:<name>[/<config>][#field]`, or `tokens:<glob>`, which is text as
        ids of nanoGPT, llm.c, Megatron or NumPy.
      context: tokens per row.
      tokenizer: `bytes` (the default), `gpt2`, `bpe:<vocabulary>`, which is trained on the source's train split, or the
        path of a tokenizer.json or a SentencePiece .model. For `tokens:` the one that made the ids, or
        `ids:<vocabulary>[,<id that ends a document>]`; not needed for llm.c.
      workers: number of processes that pack; None takes one per core.
      check: if the corpus was packed before, compare the checksums of large files too, which takes long.

    Raises:
      UserError: if the source can't be read, is too small to split and pack, or the packed corpus is damaged.
    """
    tokenizer = tokenizer or "bytes"
    _check_pair(source, tokenizer)
    if context < 1:
        raise UserError(f"context = {context} must be at least 1 token per row")
    if workers is not None and workers < 1:
        raise UserError(f"workers = {workers} must be at least 1 process")
    found, tokenizer = _read_as(look_up(source), tokenizer)
    folder = corpus_folder(found.text, tokenizer)
    if not (folder / "manifest.json").exists() or _work_folder(folder).exists():
        try:
            _pack(found, tokenizer, folder, workers, on_progress)
        except OSError as error:
            raise UserError(_what_stopped(error, folder)) from None
    return _opened(found, folder, context, check)


def inspect(source: str, context: int, tokenizer: str = "bytes", rows: int = 3) -> str:
    """Text with the counts of a packed corpus and `rows` rows of each split, evenly spaced. Compares all checksums.

    Raises:
      UserError: if the corpus isn't packed yet, or a file was cut off or changed.
    """
    _check_pair(source, tokenizer)
    for name, value in (("context", context), ("rows", rows)):
        if value < 1:
            raise UserError(f"{name} = {value} must be positive")
    asked, (found, tokenizer) = tokenizer, _read_as(look_up(source), tokenizer)
    folder = corpus_folder(found.text, tokenizer)
    if not (folder / "manifest.json").exists():
        raise UserError(
            f"{source} isn't packed as {asked} yet: scaling-jax data prepare '{source}' --tokenizer {asked}"
        )
    corpus = _opened(found, folder, context, check=True)
    lines = [f"{folder}: all checksums match", *summary(corpus)]
    packed_by = corpus_tokenizer(folder, corpus.manifest)
    if isinstance(packed_by, Ids) and asked not in ("bytes", packed_by.name):
        packed_by = _maker(asked)
    for split, rows_RxT1 in zip(SPLITS, (corpus.train_RxT1, corpus.test_RxT1), strict=True):
        for number in np.linspace(0, len(rows_RxT1) - 1, min(rows, len(rows_RxT1))).astype(int):
            lines.append(f"{split} row {number:,}: {packed_by.decode(rows_RxT1[number])!r}")
    return "\n".join(lines)


def summary(corpus: Corpus) -> list[str]:
    """Lines that describe a packed corpus."""
    m = corpus.manifest
    lines = [
        f"{m['source']}: {m['files']:,} files, {m['bytes']:,} bytes, sha256 {m['sha256'][:16]}",
        f"tokenizer {m['tokenizer']}: {m['vocab_size']:,} ids, sha256 {m['tokenizer_sha256'][:16]}"
        + (f", {m['test_bytes_per_token']:.3f} bytes per test token" if m["test_bytes_per_token"] else ""),
        f"held out: {m['held_out']}",
    ]
    if m.get("copies"):
        lines.insert(1, f"left out: {m['copies']:,} files that hold the same text as others")
    for split, rows_RxT1 in zip(SPLITS, (corpus.train_RxT1, corpus.test_RxT1), strict=True):
        lines.append(
            f"{split}: {m['documents'][split]:,} documents, "
            + (f"{m['text_bytes'][split]:,} bytes, " if m["text_bytes"][split] else "")
            + f"{m['tokens'][split]:,} tokens, {len(rows_RxT1):,} rows of {m['context']}"
        )
    return lines


def vocabulary(source: str, tokenizer: str) -> int:
    """The largest number of ids that the source will have with this tokenizer. Reads no text.

    Raises:
      UserError: see `prepare`.
    """
    _check_pair(source, tokenizer)
    if source.startswith("tokens:") and tokenizer == "bytes":
        tokenizer = ids_in(find_documents(source))
    return most_ids(tokenizer)


def _check_pair(source: str, tokenizer: str) -> None:
    """Refuses, before anything is read, a tokenizer that is unknown or doesn't go with the source."""
    trained, of_ids = bpe_vocabulary(tokenizer) is not None, tokenizer.startswith("ids:")
    if source.startswith("tokens:") and trained:
        raise UserError(f"--text {source} is tokens already: give the tokenizer that made them, not {tokenizer}")
    if of_ids and not source.startswith("tokens:"):
        raise UserError(f"tokenizer {tokenizer} is for --text 'tokens:<glob>', not for {source}: choose another")


def _read_as(found: Source, tokenizer: str) -> tuple[Source, str]:
    """The source as this tokenizer reads it. Ids that were made elsewhere stay ids, whichever tokenizer made them."""
    if found.text.source.startswith("tokens:"):
        if tokenizer == "bytes":  # not said
            tokenizer = ids_in(find_documents(found.text.source))
        ids = Ids(tokenizer if tokenizer.startswith("ids:") else ids_name(tokenizer))
        return found._replace(held_out=held_out_rule(found.shards, ids.separator)), ids.name
    if is_file(tokenizer):  # the text of another file of the same name is another text
        content = read_tokenizer(tokenizer)[1]
        both = hashlib.sha256(f"{found.text.sha256}\0".encode() + content).hexdigest()
        return found._replace(text=found.text._replace(sha256=both)), tokenizer
    return found, tokenizer


def _maker(name: str) -> Tokenizer:
    """The tokenizer that made ids elsewhere."""
    return GPT2() if name == "gpt2" else from_file(name)


def _opened(found: Source, folder: Path, context: int, check: bool) -> Corpus:
    """The packed corpus. Its manifest says how many files were left out, which may have changed since it was packed."""
    corpus = open_corpus(folder, context, check)
    return dataclasses.replace(corpus, manifest=corpus.manifest | {"copies": found.copies}) if found.copies else corpus


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
        if (
            not found.text.source.startswith("tfds:")
            and _read_as(look_up(found.text.source), name)[0].text != found.text
        ):
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
    if is_file(name):
        copied, content = read_tokenizer(name)
        write_whole(work / copied, content)
    elif bpe_vocabulary(name) is not None and not (work / "tokenizer.json").exists():
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
    for copied in ("tokenizer.json", "tokenizer.model"):
        if (work / copied).exists():
            checksums[copied] = _concatenate([work / copied], [tokenizer.sha256], whole / copied)

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
        "test_bytes_per_token": sums("text_bytes")["test"] / max(1, sums("tokens")["test"]),  # 0: unknown
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
