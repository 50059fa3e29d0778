"""Sources on this machine, `python`, `files:` and `tokens:`: their files, fingerprint, train/test split, and shards."""

import glob
import hashlib
import os
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

from scaling_jax.data.duplicates import without_links
from scaling_jax.io import UserError

SHARD_BYTES = 16 << 20  # of text; one process packs this in seconds
MOST_SHARDS = 4096  # for more text, shards get larger

TOKEN_SUFFIXES = (".bin", ".npy")

# Some distributions ship the test suites of Python and others don't, so they are left out.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    name: str  # path relative to the source's root, with "/"; decides whether it is train or test text
    path: Path


class Fingerprint(NamedTuple):
    """Identifies a text: equal fingerprints mean equal names and equal bytes."""

    source: str
    files: int
    bytes: int
    sha256: str


class Part(NamedTuple):
    """A range of bytes in the file `path`, or of records in the data set in the folder `path`."""

    kind: str  # "text": the file is one document; "jsonl": each line is one; "tfds": each record is one; "tokens"
    path: str
    held_out: bool | None  # None: the text of each document decides
    start: int = 0  # of a file of tokens, the first token or document
    stop: int | None = None  # None: to the end
    field: str = ""  # the field of a line or record that holds the text
    split: str = ""  # the split of the data set


Shard = list[Part]


class Source(NamedTuple):
    """A source as it is now: its fingerprint, its rule for the test split, and its shards."""

    text: Fingerprint
    held_out: str  # the documents of the test split, in words
    shards: list[Shard]
    copies: int = 0  # files left out, because others hold the same text


def is_test(name: str | bytes) -> bool:
    """True if a document belongs to the test split: one in ten, by the hash of its name. New files don't move old ones.

    For lines and records, which have no name, pass the text: equal texts then stay in one split.
    """
    return in_ten(hashlib.sha256(name if isinstance(name, bytes) else name.encode()))


def in_ten(digest: "hashlib._Hash") -> bool:
    """True for one SHA-256 in ten."""
    return int.from_bytes(digest.digest()[:8], "big") % 10 == 0


def find_documents(source: str) -> list[Document]:
    """The files of a source, in the order of their names.

    Args:
      source: `python`, `files:<glob>[#field]` or `tokens:<glob or folder>` (`**` stands for any folders). Of several
        links to one file, one counts. With a Megatron .bin comes its .idx.

    Raises:
      UserError: if the source is unknown or has no files.
    """
    if source == "python":
        return _python_sources(Path(sysconfig.get_path("stdlib")))
    if source.startswith("files:"):
        return _documents(_matching_files("files:", _split_field(source)[0].removeprefix("files:")))
    if source.startswith("tokens:"):
        return _documents(_token_files(source.removeprefix("tokens:")))
    raise UserError(
        f"unknown text source {source!r}: use 'python', 'tfds:<name>[/<config>]', 'tokens:<glob>' or 'files:<glob>', "
        "such as files:~/notes/**/*.txt or files:~/web/*.jsonl.gz#text"
    )


def fingerprint(source: str, documents: list[Document]) -> Fingerprint:
    """The fingerprint of all files, with a hash of their names and contents. Reads every file once."""
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
    """Shards of the files, in order. A shard is several small files, one large file, or a range of a large .jsonl.

    Raises:
      UserError: if the source names a field but no file is .jsonl.
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
        elif suffixes[-1] != ".jsonl":  # compressed, so reading can't start in the middle
            parts.append((size, Part("jsonl", path, None, field=field or "text")))
        else:
            for start in range(0, size, shard_bytes):
                stop = min(size, start + shard_bytes)
                parts.append((stop - start, Part("jsonl", path, None, start, stop, field or "text")))
    if field and all(part.kind == "text" for _, part in parts):
        raise UserError(
            f"--text {source}: only .jsonl files have fields, and none of these {len(documents)} files is .jsonl: "
            f"remove #{field}"
        )
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
    """(source, field) of `<source>#<field>`; the field is "" if there is none."""
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
            f"this Python installation has too few sources to train on ({len(documents)} .py files in {root}): "
            "give other text with --text 'files:<glob>'"
        )
    return sorted(documents)


def _matching_files(kind: str, pattern: str) -> list[Path]:
    matches = sorted(Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
    paths = [path for path in matches if path.is_file()]
    if others := [path for path in matches if not path.is_file() and not path.is_dir()]:
        if not paths:
            raise UserError(
                f"--text {kind}{pattern} matches no plain file; {others[0]} is a pipe, a device or a lost link"
            )
    elif not paths:
        raise UserError(f"--text {kind}{pattern} matches no file; for all files in a folder, write {pattern}/**")
    return paths


def _token_files(pattern: str) -> list[Path]:
    """The .bin and .npy files, and the .idx of each .bin that has one."""
    expanded = os.path.expanduser(pattern)
    if os.path.isfile(f"{expanded}.idx"):  # Megatron names a data set by its files without their ends
        pattern += ".bin"
    elif os.path.isdir(expanded):
        pattern = os.path.join(pattern, "**")
    matches = _matching_files("tokens:", pattern)
    paths = [path for path in matches if path.suffix in TOKEN_SUFFIXES]
    if not paths:
        raise UserError(
            f"--text tokens:{pattern} matches {matches[0].name}, but no {' or '.join(TOKEN_SUFFIXES)}: give files of "
            "nanoGPT, llm.c, Megatron or NumPy"
        )
    paths = without_links(paths)
    return paths + [index for path in paths if (index := path.with_suffix(".idx")).is_file() and path.suffix == ".bin"]


def _documents(paths: list[Path]) -> list[Document]:
    root = os.path.commonpath([path.parent for path in paths])
    return sorted(Document(path.relative_to(root).as_posix(), path) for path in without_links(paths))
