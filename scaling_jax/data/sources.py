"""Where text comes from: `python` (the standard library's own sources) or `files:<glob>`, as named documents."""

import glob
import hashlib
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

from scaling_jax.errors import UserError

# Test suites are left out because distributions disagree on whether they ship them.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    name: str  # path relative to the source's root, "/"-separated: decides train or test
    path: Path


class Fingerprint(NamedTuple):
    """What the text was: equal fingerprints mean equal bytes under equal names."""

    source: str
    files: int
    bytes: int
    sha256: str


def find_documents(source: str) -> list[Document]:
    """Documents of a source, in the order of their names.

    Args:
      source: `python`, or `files:<glob>` (`**` descends into folders).

    Raises:
      UserError: if the source is unknown or holds no file.
    """
    if source == "python":
        return _python_sources(Path(sysconfig.get_path("stdlib")))
    if source.startswith("files:"):
        return _matching_files(source.removeprefix("files:"))
    raise UserError(f"unknown text source {source!r}: use 'python' or 'files:<glob>', such as files:~/notes/**/*.txt")


def is_test(name: str) -> bool:
    """Whether a document is held out: one name in ten, by hash, so that adding files moves no other file."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10 == 0


def fingerprint(source: str, documents: list[Document]) -> Fingerprint:
    """Reads every document once; the hash covers names and contents."""
    digest, total_bytes = hashlib.sha256(), 0
    for document in documents:
        content = document.path.read_bytes()
        total_bytes += len(content)
        digest.update(f"{document.name}\0{len(content)}\0".encode() + content)
    return Fingerprint(source, len(documents), total_bytes, digest.hexdigest())


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
