"""Files of a source that hold the same text: links to one file, and copies. Each text is counted once.

A text that came twice could be on both sides of the train/test split, and the test loss would then be that of a text
which the model has seen.
"""

import collections
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def without_links(paths: Iterable[Path]) -> list[Path]:
    """One path for each file, in order; of several links to one file, the path without a symbolic link, if any."""
    same: dict[tuple[int, int], list[Path]] = collections.defaultdict(list)
    for path in paths:
        found = path.stat()
        same[found.st_dev, found.st_ino].append(path)
    kept = {group[0] if len(group) == 1 else min(group, key=_preference) for group in same.values()}
    return [path for group in same.values() for path in group if path in kept]


def copies(paths: Sequence[Path]) -> set[int]:
    """The indices of files with the same content as one before. Reads only files whose sizes are equal.

    Raises:
      OSError: if a file can't be read.
    """
    sizes = [path.stat().st_size for path in paths]
    counts = collections.Counter(sizes)
    seen: set[tuple[int, str]] = set()
    later: set[int] = set()
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if counts[size] == 1:
            continue
        with path.open("rb") as file:
            content = size, hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if content in seen:
            later.add(index)
        seen.add(content)
    return later


def _preference(path: Path) -> tuple[bool, str]:
    absolute = os.path.abspath(path)
    return os.path.realpath(absolute) != absolute, absolute
