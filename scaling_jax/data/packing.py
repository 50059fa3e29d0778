"""Documents packed into fixed-length rows, once, in a cache folder that later runs reuse."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from scaling_jax.data.cache import cache_folder
from scaling_jax.data.sources import find_documents, fingerprint, is_test
from scaling_jax.data.tokenizers import Bytes, Tokenizer
from scaling_jax.errors import UserError

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Packed text: row r holds tokens r·T … r·T + T, so row[:-1] predicts row[1:] and each token is predicted once."""

    train_RxT1: np.ndarray  # uint16, memory-mapped
    test_RxT1: np.ndarray
    vocab_size: int
    manifest: dict  # source, files, bytes, sha256, tokenizer, context, train_tokens, test_tokens


def pack_rows(documents: Iterable[np.ndarray], separator: int, context: int) -> np.ndarray:
    """Rows [R, context + 1] of the documents' tokens end to end, `separator` after each; a last part row is dropped."""
    pieces = [piece for tokens in documents for piece in (tokens, np.array([separator], np.uint16))]
    stream = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    num_rows = max(0, (len(stream) - 1) // context)
    return stream[np.arange(num_rows)[:, None] * context + np.arange(context + 1)]


def prepare(source: str, context: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of a source, packed now unless the same text was packed before.

    Args:
      source: see `find_documents`.
      context: tokens per row.

    Raises:
      UserError: if the source can't be read or is too small to split and pack.
    """
    tokenizer = tokenizer or Bytes()
    documents = find_documents(source)
    text = fingerprint(source, documents)
    folder = cache_folder() / "rows" / f"{text.sha256[:16]}-{tokenizer.name}-{context}"
    if not (folder / "manifest.json").exists():
        held_out = {is_test(document.name) for document in documents}
        rows = _read_splits(documents, text.sha256, tokenizer, context) if len(held_out) == 2 else {}
        for split in ("train", "test"):
            if not len(rows.get(split, ())):
                raise UserError(
                    f"--text {source}: {text.files} files of {text.bytes:,} bytes leave no {split} row of {context} "
                    "tokens (one file in ten, by its name, is held out): add files or shorten the context"
                )
        manifest = {
            "format": _FORMAT,
            **text._asdict(),
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "context": context,
            "train_tokens": rows["train"].shape[0] * context,
            "test_tokens": rows["test"].shape[0] * context,
        }
        _write_atomically(folder, rows, manifest)
    return _load(folder)


def _load(folder: Path) -> Corpus:
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] != _FORMAT:
        raise UserError(f"{folder} was written by another version of scaling_jax: remove it, it is rebuilt")
    train, test = (np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "test"))
    return Corpus(train, test, manifest["vocab_size"], manifest)


def _read_splits(documents, sha256: str, tokenizer: Tokenizer, context: int) -> dict[str, np.ndarray]:
    import absl.logging
    import tensorflow_datasets as tfds  # seconds to import: only who packs pays

    from scaling_jax.data.text_files import TextFiles

    absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS announces at length what is normal here
    tfds.disable_progress_bar()
    builder = TextFiles(documents, sha256[:16], data_dir=cache_folder() / "tfds", file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    rows = {}
    for split in ("train", "test"):
        texts = (example["text"].decode("utf-8") for example in builder.as_data_source(split))
        rows[split] = pack_rows(map(tokenizer.encode, texts), tokenizer.separator, context)
    return rows


def _write_atomically(folder: Path, rows: dict[str, np.ndarray], manifest: dict) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".packing-", dir=folder.parent))
    for split, rows_RxT1 in rows.items():
        np.save(unfinished / f"{split}.npy", rows_RxT1)
    (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    try:
        os.replace(unfinished, folder)
    except OSError:  # another process finished the same rows first
        shutil.rmtree(unfinished)
        if not (folder / "manifest.json").exists():
            raise
