"""A packed corpus: its folder in the cache, its token streams as rows, and checks that its files are intact.

The folder has two token files, `train.tokens` and `test.tokens`, which are memory-mapped, and a `manifest.json`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling_jax.data.duplicates import copies
from scaling_jax.data.sources import Document, Fingerprint, Source, file_shards, find_documents, fingerprint
from scaling_jax.data.token_documents import held_out_files, token_shards
from scaling_jax.data.tokenizers import Tokenizer, is_file, load_tokenizer
from scaling_jax.io import UserError
from scaling_jax.io.files import write_whole
from scaling_jax.io.stores import cache_folder

FORMAT = 2
SPLITS = ("train", "test")
_CHECKED_ALWAYS = 64 << 20  # bytes; the checksum of smaller files takes well under a second


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Packed text. Row r holds tokens r·T … r·T + T, so row[:-1] predicts row[1:] and each token is predicted once."""

    train_RxT1: np.ndarray  # uint16 (uint32 above 65,536 ids), memory-mapped
    test_RxT1: np.ndarray
    vocab_size: int
    manifest: dict  # source, files, bytes, sha256, held_out, tokenizer, context, counts, checksums of the token files

    @property
    def train(self) -> np.ndarray:
        return self.train_RxT1

    @property
    def held_out(self) -> np.ndarray:
        return self.test_RxT1


def bits_per_byte(nats_per_token: float, manifest: dict) -> float | None:
    """A test loss in bits per byte, which doesn't depend on the tokenizer; None if the manifest has no byte count."""
    bytes_per_token = manifest.get("test_bytes_per_token")
    return nats_per_token / math.log(2) / bytes_per_token if bytes_per_token else None


def rows_of(stream: np.ndarray, context: int) -> np.ndarray:
    """A stream of tokens as rows [R, context + 1], without copying.

    The last token of a row is also the first token of the next. Tokens after the last full row are left out.
    """
    if len(stream) <= context:
        return np.zeros((0, context + 1), stream.dtype)
    return np.lib.stride_tricks.sliding_window_view(stream, context + 1, subok=True)[::context]


def look_up(source: str) -> Source:
    """The fingerprint and the shards of a source, as it is now. Reads files only if they changed since the last time.

    Raises:
      UserError: see `prepare`.
    """
    if source.startswith("tfds:"):
        from scaling_jax.data.tfds_text import find_data_set  # seconds to import

        return find_data_set(source)
    documents = find_documents(source)
    try:
        text, left_out = _known_fingerprint(source, documents)
        kept = [document for document in documents if document.name not in left_out]
        if source.startswith("tokens:"):
            return Source(text, "", token_shards(kept), len(left_out))  # the rule depends on the separator
        shards = file_shards(source, kept)
    except OSError as error:
        raise UserError(f"--text {source}: can't read {error.filename} ({error.strerror})") from None
    if any(part.kind == "text" for shard in shards for part in shard):
        rule = "one file in ten, by the hash of its name"
    else:
        rule = "one line in ten, by the hash of its text"
    return Source(text, rule, shards, len(left_out))


def corpus_folder(text: Fingerprint, tokenizer: str) -> Path:
    """The folder of the packed corpus of a text. Each field of a source has its own folder."""
    field = text.source.rpartition("#")[2] if "#" in text.source else ""
    name = Path(tokenizer).name if is_file(tokenizer) else tokenizer.replace(":", "")
    parts = [text.sha256[:16], name, *([field.replace("/", "_")] if field else [])]
    return cache_folder() / "rows" / "-".join(parts)


def open_corpus(folder: Path, context: int, check: bool = False) -> Corpus:
    """The corpus in a folder that `prepare` wrote.

    Args:
      check: compare the checksums of large files too, which takes long. Sizes, and checksums of small files, are always
        compared.

    Raises:
      UserError: if a file was cut off or changed, or a split has no row of `context` tokens.
    """
    manifest = check_files(folder, check)
    rows = {}
    for split in SPLITS:
        path = folder / f"{split}.tokens"
        stream = np.memmap(path, manifest["dtype"], "r") if path.stat().st_size else np.zeros(0, manifest["dtype"])
        rows[split] = rows_of(stream, context)
        if not len(rows[split]):
            raise UserError(
                f"--text {manifest['source']}: {manifest['files']} files of {manifest['bytes']:,} bytes, which are "
                f"{sum(manifest['documents'].values()):,} documents, are too short for a {split} row of {context} "
                f"tokens (held out: {manifest['held_out']}): add text or use a shorter context"
            )
    counts = {f"{split}_tokens": len(rows[split]) * context for split in SPLITS}
    return Corpus(rows["train"], rows["test"], manifest["vocab_size"], {**manifest, "context": context, **counts})


def check_files(folder: Path, check: bool) -> dict:
    """The manifest of a corpus folder, once its files are checked; see `open_corpus`."""
    remedy = f"remove {folder}, and it will be packed again"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder} was written by another version of scaling_jax: {remedy}")
        if wrong := _what_is_wrong(manifest, folder):
            raise UserError(f"{folder / 'manifest.json'} was changed after the text was packed ({wrong}): {remedy}")
        for name, said in manifest["checksums"].items():
            size = (folder / name).stat().st_size
            if size != said["bytes"]:
                raise UserError(f"{folder / name} has {size:,} bytes instead of {said['bytes']:,}: {remedy}")
            if (check or size <= _CHECKED_ALWAYS) and sha256_of(folder / name) != said["sha256"]:
                raise UserError(f"{folder / name} was changed after it was packed: {remedy}")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged ({error}): {remedy}") from None
    return manifest


def manifest_sha256(manifest: dict) -> str:
    """The checksum of all that a manifest says, except its own checksum."""
    said = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _what_is_wrong(manifest: dict, folder: Path) -> str | None:
    """What a manifest says that can't be true of the corpus in this folder; None if it may be true."""
    # Version 0.1 wrote no checksum; then the rest must agree with itself, with the folder and with the files.
    if manifest.get("manifest_sha256", (whole := manifest_sha256(manifest))) != whole:
        return "its checksum differs"
    text = Fingerprint(*(manifest[name] for name in Fingerprint._fields))
    if corpus_folder(text, manifest["tokenizer"]).name != folder.name:
        return f"it is that of {text.source}, sha256 {text.sha256[:16]}, as {manifest['tokenizer']}"
    files = {f"{split}.tokens" for split in SPLITS}
    if not files <= set(manifest["checksums"]) <= files | {"tokenizer.json", "tokenizer.model"}:
        return f"its files are {', '.join(manifest['checksums'])}"
    if manifest["dtype"] != token_dtype(manifest["vocab_size"]).str:
        return f"dtype {manifest['dtype']} with {manifest['vocab_size']:,} ids"
    for split in SPLITS:
        tokens, size = manifest["tokens"][split], manifest["checksums"][f"{split}.tokens"]["bytes"]
        if tokens * np.dtype(manifest["dtype"]).itemsize != size:
            return f"{tokens:,} {split} tokens in {size:,} bytes"
    return None


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of tokens on disk: uint16, or uint32 above 65,536 ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def corpus_tokenizer(folder: Path, manifest: dict) -> Tokenizer:
    """The tokenizer with which a corpus was packed.

    Raises:
      UserError: if it isn't available any more.
    """
    tokenizer = load_tokenizer(manifest["tokenizer"], folder)
    if tokenizer.sha256 != manifest["tokenizer_sha256"]:
        raise UserError(
            f"{folder} was packed with another version of {manifest['tokenizer']}: remove the folder, and it will be "
            "packed again"
        )
    return tokenizer


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known_fingerprint(source: str, documents: list[Document]) -> tuple[Fingerprint, set[str]]:
    """The fingerprint of the files that count, and the names of those that don't, because others hold the same text.

    Cached on disk by the names, sizes and change times of the files.
    """
    digest, newest = hashlib.sha256(), 0
    for document in documents:
        stat = document.path.stat()
        digest.update(
            f"{document.path}\0{document.name}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\0".encode()
        )
        newest = max(newest, stat.st_ctime_ns)
    path = cache_folder() / "fingerprints" / f"{digest.hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        *said, checksum = json.loads(path.read_text())
        if checksum == _fingerprint_checksum(path, said):
            *values, left_out = said
            return Fingerprint(source, *values), set(left_out)
    left_out = _copies(source, documents)
    text = fingerprint(source, [document for document in documents if document.name not in left_out])
    # A file that changed just now could change again with the same time stamp, so don't cache its fingerprint yet.
    if time.time_ns() - newest > 2e9:
        with contextlib.suppress(OSError):
            values = [*text[1:], left_out]
            write_whole(path, json.dumps([*values, _fingerprint_checksum(path, values)]))
    return text, set(left_out)


def _copies(source: str, documents: list[Document]) -> list[str]:
    """Names of files that hold the same text as another. The built-in text is taken as it is."""
    if source == "python":
        return []
    held_out = held_out_files(documents) if source.startswith("tokens:") else set()
    files = [document for document in documents if document.path.suffix != ".idx" or not source.startswith("tokens:")]
    files.sort(key=lambda document: (document.name not in held_out, document.name))  # a held-out copy is kept
    found = sorted(files[index].name for index in copies([document.path for document in files]))
    indices = {document.name for document in documents} & {str(Path(name).with_suffix(".idx")) for name in found}
    return found + sorted(indices if source.startswith("tokens:") else [])


def _fingerprint_checksum(path: Path, values: Sequence) -> str:
    """Holds for these values at this path only, so that a fingerprint that was edited or exchanged is made again."""
    return hashlib.sha256(json.dumps([path.name, *values]).encode()).hexdigest()
