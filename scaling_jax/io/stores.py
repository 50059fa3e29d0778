"""Where results are kept: in a folder, or in a Google Cloud Storage bucket through a working copy on this machine.

What follows is about buckets; for a folder on disk `working_copy` gives the folder itself and the rest does nothing.

A command makes the copy equal to the bucket when it starts, reads and writes there, and publishes what has changed:
a run's records with every checkpoint and at its end, so that the bucket always holds a state to go on from, and the
records up to it. Checkpoints themselves are written to the bucket by all processes, past the copy.

A bucket has no locks. Whoever claimed a run last may write its records; whoever had it before finds that out when it
next publishes, and stops.
"""

import base64
import contextlib
import functools
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from scaling_jax.io import UserError
from scaling_jax.io.files import write_whole
from scaling_jax.io.locks import lock_state

_ADDRESS = re.compile(r"gs:/+([^/]+)/(.+?)/*")  # pathlib takes one of two slashes away
_MARKER = ".bucket"  # holds the address of the working copy that it lies in
_CLAIM = ".claim"
_NOT_COPIED = ("checkpoints", "snapshots", "logs")  # folders

_claims: dict[Path, str] = {}


def cache_folder() -> Path:
    """For what can be made again: `$SCALING_JAX_CACHE`, else `scaling_jax` in the user's cache folder."""
    chosen = os.environ.get("SCALING_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaling_jax"


def working_copy(results: str | Path, fetch: bool = True) -> Path:
    """Where this machine reads and writes results: a copy of what `gs://bucket/folder` holds, or the folder given.

    Args:
      fetch: make the copy equal to the bucket, but for runs that this machine is training. Of several processes the
        first alone should.

    Raises:
      UserError: if the address is incomplete or the bucket can't be read, or gcsfs isn't installed.
    """
    if not str(results).startswith("gs:/"):
        return Path(results)
    match = _ADDRESS.fullmatch(str(results))
    if match is None:
        raise UserError(f"results in a bucket need its name and a folder, such as gs://bucket/demo, not {results}")
    copy = cache_folder().resolve() / "buckets" / match[1] / match[2]
    copy.mkdir(parents=True, exist_ok=True)
    (copy / _MARKER).write_text(f"gs://{match[1]}/{match[2]}")
    if fetch:
        _fetch(copy)
    return copy


def in_bucket(folder: Path) -> bool:
    """Whether a folder is part of a working copy."""
    return _address_of(folder) is not None


def address(folder: Path) -> epath.Path:
    """Where all processes find a folder: in the bucket of a working copy, else where it is."""
    return epath.Path(_address_of(folder) or folder.resolve())


def claim(folder: Path) -> None:
    """From now on this process alone may `publish` a folder of a working copy; others are stopped when they try."""
    if (found := _address_of(folder)) is None:
        return
    _claims[folder] = f"process {os.getpid()} of {socket.gethostname()} ({uuid.uuid4().hex})"
    with _named(found):
        _bucket().pipe_file(f"{found}/{_CLAIM}", _claims[folder].encode())


def publish(folder: Path) -> None:
    """Brings what changed in a folder of a working copy to its bucket, whole objects at a time, result.json last.

    Raises:
      UserError: if the bucket can't be written, or another process has claimed the folder since.
    """
    if (found := _address_of(folder)) is None:
        return
    with _named(found):
        if folder in _claims and (owner := _bucket().cat_file(f"{found}/{_CLAIM}").decode()) != _claims[folder]:
            raise UserError(f"{found} is continued by {owner.split(' (')[0]} now: this one stops")
        there = _objects(found)
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in _files(folder)}
        changed = [name for name, content in contents.items() if there.get(name) != _md5(content)]
        for is_last in (False, True):  # together but for results, which say that the rest is there
            _bucket().pipe({f"{found}/{name}": contents[name] for name in changed if _is_result(name) == is_last})


def _fetch(copy: Path) -> None:
    found = _address_of(copy)
    if found is None or lock_state(copy / ".lock").held:
        return
    training = {lock.parent for lock in copy.glob("runs/*/.lock") if lock_state(lock).held}
    with _named(found):
        there = _objects(found)
        here = {path.relative_to(copy).as_posix(): _md5(path.read_bytes()) for path in _files(copy)}
        outdated = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
        outdated = [name for name in outdated if not training.intersection((copy / name).parents)]
        for name in outdated:
            if name not in there:
                (copy / name).unlink()
        addresses = {name: f"{found}/{name}".removeprefix("gs://") for name in outdated if name in there}
        contents = _bucket().cat(list(addresses.values())) if addresses else {}
        for name, at in addresses.items():
            write_whole(copy / name, contents[at])


def _address_of(folder: Path) -> str | None:
    folder = Path(os.path.abspath(folder))
    for parent in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return "/".join([(parent / _MARKER).read_text(), *folder.relative_to(parent).parts])
    return None


def _files(folder: Path) -> list[Path]:
    """Those of a working copy that are also in the bucket."""
    return [path for path in folder.rglob("*") if path.is_file() and _is_copied(path.relative_to(folder).as_posix())]


def _is_copied(name: str) -> bool:
    *folders, file = name.split("/")
    return not file.startswith(".") and not any(folder in _NOT_COPIED for folder in folders)


def _is_result(name: str) -> bool:
    return name.rpartition("/")[2] == "result.json"


def _objects(found: str) -> dict[str, str]:
    """Names below an address, and their MD5 hashes."""
    prefix = found.removeprefix("gs://") + "/"
    objects = _bucket().find(prefix, detail=True)
    named = {name.removeprefix(prefix): entry.get("md5Hash", "") for name, entry in objects.items()}
    return {name: md5 for name, md5 in named.items() if _is_copied(name)}


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


@functools.cache
def _bucket() -> Any:
    try:
        import gcsfs
    except ImportError:
        raise UserError("results in gs:// need gcsfs: pip install 'scaling-jax[gcs]'") from None
    return gcsfs.GCSFileSystem(use_listings_cache=False)


@contextlib.contextmanager
def _named(found: str) -> Iterator[None]:
    """Says what of Google's many errors the user can act on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # gcsfs, aiohttp and google.auth each have their own
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{found} can't be read or written ({what}): check the bucket's name and your rights") from None
