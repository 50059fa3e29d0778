"""Who works on a run, a scan or a text that is packed: a lock file, which the system frees when its process ends."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from scaling_jax.io import UserError


@contextlib.contextmanager
def locked(
    path: Path, what: str, *, seconds: float = 60.0, wait: bool = False, insist: bool = False
) -> Iterator[int | None]:
    """Holds a lock file; yields its descriptor, for processes that shall hold it as well; None on Windows.

    A holder that has ended may have left processes that still save their runs: they are waited for.

    Args:
      what: is locked, for messages.
      seconds: to wait at most.
      wait: for a holder that lives, too.
      insist: refuse a file system without locks instead of doing without.

    Raises:
      UserError: naming the process that holds it, or if the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"can't write to {path.parent}: {error.strerror}; choose another folder") from None
    with file:
        until = time.monotonic() + seconds
        while (holder := _take(file, insist)) is not None:
            if time.monotonic() > until or not (wait or _ended(*holder)):
                who = " of ".join(filter(None, holder))
                raise UserError(f"{what} is in use by process {who}: wait for it, or stop it")
            time.sleep(min(1.0, seconds / 10))
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
        yield file.fileno() if os.name == "posix" else None


class LockState(NamedTuple):
    """`held` is None where the system can't tell; `since` is when the lock was last taken, in seconds since 1970."""

    held: bool | None
    since: float


def lock_state(path: Path) -> LockState:
    """Whether a process holds a lock file now; leaves the file as it is."""
    try:
        file = path.open()
    except FileNotFoundError:
        return LockState(False, 0.0)
    with file:
        since = path.stat().st_mtime
        try:
            import fcntl
        except ImportError:  # not on Windows
            return LockState(None, since)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return LockState(True, since)
        return LockState(False, since)


def _take(file: IO[str], insist: bool) -> tuple[str, str] | None:
    """Locks the file, or says which process of which machine holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        pid, _, host = file.read().strip().partition(" ")
        return pid, host
    except (ImportError, OSError) as error:  # Windows, or a file system without locks
        if insist:
            raise UserError(f"can't lock {file.name} ({error}): use a file system with locks") from None
    return None


def _ended(pid: str, host: str) -> bool:
    """Whether a process is known to be gone: one of another machine isn't."""
    if host not in ("", socket.gethostname()):
        return False
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return True
    except PermissionError:
        pass
    return False
