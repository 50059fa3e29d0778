"""Results in a Google Cloud Storage bucket, through a working copy on this machine; and the cache folder.

For results in a folder on disk, `working_copy` returns the folder itself and the other functions do nothing.

A command first makes the working copy equal to the bucket. It then reads and writes the copy, and publishes changes to
the bucket: a run's records with every checkpoint and at the end of the run. So the bucket always holds a checkpoint to
continue from, and the records up to it. Checkpoints don't go through the copy; all processes write them to the bucket.

A bucket has no locks. Only the process that claimed a run last may write its records. A process that had claimed the
run before notices this when it next publishes, and stops.
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

_ADDRESS = re.compile(r"gs:/+([^/]+)/(.+?)/*")  # one slash is enough: pathlib removes the other
_MARKER = ".bucket"  # file in a working copy with its address in the bucket
_CLAIM = ".claim"
_NOT_COPIED = ("checkpoints", "snapshots", "logs")  # folders

_claims: dict[Path, str] = {}


def cache_folder() -> Path:
    """Folder for files that can be made again: `$SCALING_JAX_CACHE`, else `scaling_jax` in the user's cache folder.

    Raises:
      UserError: if the folder is in the home of a user that isn't there.
    """
    chosen = os.environ.get("SCALING_JAX_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaling_jax"
    except RuntimeError as error:
        said = f"SCALING_JAX_CACHE={chosen}" if chosen else "the cache folder"
        raise UserError(f"{said} has no home ({error}): set SCALING_JAX_CACHE to a folder") from None


def working_copy(results: str | Path, fetch: bool = True) -> Path:
    """The folder in which this machine reads and writes results: a copy of `gs://bucket/folder`, or the folder given.

    Args:
      fetch: make the copy equal to the bucket, except runs that this machine is training. Of several processes, only
        the first should do so.

    Raises:
      UserError: if the address is incomplete, the bucket can't be read, or gcsfs isn't installed.
    """
    if not str(results).startswith("gs:/"):
        return Path(results)
    match = _ADDRESS.fullmatch(str(results))
    if match is None:
        raise UserError(f"{results} must name a bucket and a folder in it, such as gs://bucket/demo")
    copy = cache_folder().resolve() / "buckets" / match[1] / match[2]
    copy.mkdir(parents=True, exist_ok=True)
    (copy / _MARKER).write_text(f"gs://{match[1]}/{match[2]}")
    if fetch:
        _fetch(copy)
    return copy


def in_bucket(folder: Path) -> bool:
    """True if the folder is part of a working copy."""
    return _address_of(folder) is not None


def address(folder: Path) -> epath.Path:
    """The path of a folder for all processes: in the bucket if it is part of a working copy, else the folder itself."""
    return epath.Path(_address_of(folder) or folder.resolve())


def claim(folder: Path) -> None:
    """Makes this process the only one that may `publish` a folder of a working copy. Others get an error."""
    if (found := _address_of(folder)) is None:
        return
    _claims[folder] = f"process {os.getpid()} of {socket.gethostname()} ({uuid.uuid4().hex})"
    with _named(found):
        _bucket().pipe_file(f"{found}/{_CLAIM}", _claims[folder].encode())


def publish(folder: Path) -> None:
    """Copies the changed files of a folder to its bucket, result.json last.

    Raises:
      UserError: if the bucket can't be written, or another process has claimed the folder since.
    """
    if (found := _address_of(folder)) is None:
        return
    with _named(found):
        if folder in _claims and (owner := _bucket().cat_file(f"{found}/{_CLAIM}").decode()) != _claims[folder]:
            raise UserError(f"{found} now belongs to {owner.split(' (')[0]}, which continues it: this process stops")
        there = _objects(found)
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in _files(folder)}
        changed = [name for name, content in contents.items() if there.get(name) != _md5(content)]
        for is_last in (False, True):  # result.json tells readers that the other files are complete
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
    """The files of a working copy that belong in the bucket."""
    return [path for path in folder.rglob("*") if path.is_file() and _is_copied(path.relative_to(folder).as_posix())]


def _is_copied(name: str) -> bool:
    *folders, file = name.split("/")
    return not file.startswith(".") and not any(folder in _NOT_COPIED for folder in folders)


def _is_result(name: str) -> bool:
    return name.rpartition("/")[2] == "result.json"


def _objects(found: str) -> dict[str, str]:
    """{name below an address: MD5 hash} of the objects in the bucket."""
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
        raise UserError("results in gs:// need the package gcsfs: pip install 'scaling-jax[gcs]'") from None
    return gcsfs.GCSFileSystem(use_listings_cache=False)


@contextlib.contextmanager
def _named(found: str) -> Iterator[None]:
    """Turns any error of the Google libraries into a one-line UserError that names the address."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # gcsfs, aiohttp and google.auth each have their own
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"can't read or write {found} ({what}): check the bucket's name and your permissions") from None
