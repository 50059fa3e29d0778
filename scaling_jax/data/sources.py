"""Where text comes from: `python`, `files:<glob>` or `tfds:<name>`, looked up and dealt into shards to read."""

import glob
import hashlib
import os
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

from scaling_jax.io import UserError

# Test suites are left out because distributions disagree on whether they ship them.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

SHARD_BYTES = 16 << 20  # of text: what one process packs in seconds
MOST_SHARDS = 4096  # larger text makes larger shards, not more files


class Document(NamedTuple):
    name: str  # path relative to the source's root, "/"-separated: decides train or test
    path: Path


class Fingerprint(NamedTuple):
    """What the text was: equal fingerprints mean equal bytes under equal names."""

    source: str
    files: int
    bytes: int
    sha256: str


class Part(NamedTuple):
    """A range of a source: bytes of the file `path`, or records of the data set in the folder `path`."""

    kind: str  # "text": the file is one document; "jsonl": each line is one; "tfds": each record is one
    path: str
    held_out: bool | None  # None: each document by its text
    start: int = 0
    stop: int | None = None  # None: to the end
    field: str = ""  # of a line or record
    split: str = ""  # of records


Shard = list[Part]


class Source(NamedTuple):
    """A source looked up: what its text is, how it splits, and the shards it is read in."""

    text: Fingerprint
    held_out: str  # which documents are the test split, in words
    shards: list[Shard]


def is_test(name: str | bytes) -> bool:
    """Whether a document is held out: one name (in UTF-8) in ten, by hash, so that adding files moves no other file.

    Documents without a name of their own (lines, records) are held out by their text, so that equal ones stay together.
    """
    utf8 = name if isinstance(name, bytes) else name.encode()
    return int.from_bytes(hashlib.sha256(utf8).digest()[:8], "big") % 10 == 0


def find_documents(source: str) -> list[Document]:
    """Files of a source, in the order of their names.

    Args:
      source: `python`, or `files:<glob>[#field]` (`**` descends into folders).

    Raises:
      UserError: if the source is unknown or holds no file.
    """
    if source == "python":
        return _python_sources(Path(sysconfig.get_path("stdlib")))
    if source.startswith("files:"):
        return _matching_files(_split_field(source)[0].removeprefix("files:"))
    raise UserError(
        f"unknown text source {source!r}: use 'python', 'tfds:<name>[/<config>]' or 'files:<glob>', "
        "such as files:~/notes/**/*.txt or files:~/web/*.jsonl.gz#text"
    )


def fingerprint(source: str, documents: list[Document]) -> Fingerprint:
    """Reads every file once; the hash covers names and contents."""
    digest, total_bytes = hashlib.sha256(), 0
    for document in documents:
        with document.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{document.name}\0{size}\0".encode())
            while block := file.read(1 << 20):
                total_bytes += len(block)
                digest.update(block)
    return Fingerprint(source, len(documents), total_bytes, digest.hexdigest())


def file_shards(source: str, documents: list[Document]) -> list[Shard]:
    """The files in their order, several small ones or a range of a large .jsonl to a shard.

    Raises:
      UserError: if a field is named but no file has fields.
    """
    field = _split_field(source)[1]
    sizes = [document.path.stat().st_size for document in documents]
    shard_bytes = max(SHARD_BYTES, -(-sum(sizes) // MOST_SHARDS))
    parts: list[tuple[int, Part]] = []
    for document, size in zip(documents, sizes, strict=True):
        suffixes = document.path.suffixes
        path = str(document.path.absolute())
        if ".jsonl" not in suffixes[-2:]:
            parts.append((size, Part("text", path, is_test(document.name))))
        elif suffixes[-1] != ".jsonl":  # compressed: it can't be entered in the middle
            parts.append((size, Part("jsonl", path, None, field=field or "text")))
        else:
            for start in range(0, size, shard_bytes):
                stop = min(size, start + shard_bytes)
                parts.append((stop - start, Part("jsonl", path, None, start, stop, field or "text")))
    if field and all(part.kind == "text" for _, part in parts):
        raise UserError(f"--text {source}: only .jsonl files have fields, none of these {len(documents)} files is one")
    shards: list[Shard] = [[]]
    filled = 0
    for size, part in parts:
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    return shards


def _split_field(source: str) -> tuple[str, str]:
    """`files:<glob>#<field>` or `tfds:<name>#<field>` in two; no field is ""."""
    match = re.fullmatch(r"(.*)#([\w-]+)", source)
    return (match[1], match[2]) if match else (source, "")


def _python_sources(root: Path) -> list[Document]:
    documents = [
        Document(path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(root).parts)
    ]
    if len(documents) < 100:
        raise UserError(
            f"this Python ships no sources to train on ({len(documents)} .py files under {root}): "
            "point at other text with --text 'files:<glob>'"
        )
    return sorted(documents)


def _matching_files(pattern: str) -> list[Document]:
    expanded = os.path.expanduser(pattern)
    paths = sorted(Path(match) for match in glob.glob(expanded, recursive=True) if os.path.isfile(match))
    if not paths:
        raise UserError(f"--text files:{pattern} matches no file (folders need a pattern inside, such as {pattern}/**)")
    root = os.path.commonpath([path.parent for path in paths])
    return sorted(Document(path.relative_to(root).as_posix(), path) for path in paths)
