"""Lock files: only one process at a time writes a run, a scan or a packed text.

The system frees a lock when the process that holds it ends.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from scaling_jax.io import UserError
from scaling_jax.io.files import open_plain


class InUse(UserError):
    """Another process holds a lock."""


@contextlib.contextmanager
def locked(
    path: Path, what: str, *, seconds: float = 60.0, wait: bool = False, insist: bool = False
) -> Iterator[int | None]:
    """Holds a lock file. Yields its descriptor (None on Windows); a child process that inherits it holds the lock too.

    If the process that took the lock has ended, its children may still hold the lock while they save. `locked` waits
    for them.

    Args:
      what: the locked thing, for messages.
      seconds: the longest wait.
      wait: also wait for a process that is still running.
      insist: raise an error if the file system has no locks, instead of going on without a lock.

    Raises:
      InUse: if another process holds the lock. Names it.
      UserError: if the file can't be written. Names the folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_plain(path, "a+")
    except OSError as error:
        raise UserError(f"can't write to {path.parent}: {error.strerror}; choose another folder") from None
    with file:
        until = time.monotonic() + seconds
        while (holder := _take(file, insist)) is not None:
            if time.monotonic() > until or not (wait or _ended(*holder)):
                who = " of ".join(filter(None, holder))
                raise InUse(f"{what} is in use by process {who}: wait for it, or stop it")
            time.sleep(min(1.0, seconds / 10))
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
        yield file.fileno() if os.name == "posix" else None


class LockState(NamedTuple):
    """Whether a process holds a lock file."""

    held: bool | None  # None if the system can't tell
    since: float  # time at which the lock was last taken, in seconds since 1970


def lock_state(path: Path) -> LockState:
    """The state of a lock file now. Doesn't change the file."""
    try:
        file = open_plain(path, "r")
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
    """Locks the file and returns None; or returns (process id, machine) of the process that holds it."""
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
    """True if the process has surely ended. For a process of another machine we can't know."""
    if host not in ("", socket.gethostname()):
        return False
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return True
    except PermissionError:
        pass
    return False
