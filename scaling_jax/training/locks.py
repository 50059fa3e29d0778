"""Who works on a run, a scan or a group of one: a lock file that its process holds, and the system frees at its end."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from scaling_jax.errors import UserError


@contextlib.contextmanager
def locked(path: Path, what: str, *, seconds: float = 60.0, between_machines: bool = False) -> Iterator[int | None]:
    """Holds a lock file; yields its descriptor, for processes that shall hold it as well; None on Windows.

    A holder that has ended may have left processes that still save their runs: they are waited for.

    Args:
      what: is locked, for messages.
      seconds: to wait at most.
      between_machines: a holder that hasn't ended is waited for, too, because an engine may have given up a machine
        before that has saved; and a file system without locks is refused instead of doing without.

    Raises:
      UserError: naming the process that holds it, or if the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"can't write results to {path.parent}: {error.strerror}; choose another folder") from None
    with file:
        until = time.monotonic() + seconds
        while (holder := _take(file, between_machines)) is not None:
            if time.monotonic() > until or not (between_machines or _ended(*holder)):
                who = " of ".join(filter(None, holder))
                raise UserError(f"{what} is in use by process {who}: wait for it, or stop it")
            time.sleep(min(1.0, seconds / 10))
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
        yield file.fileno() if os.name == "posix" else None


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file now."""
    if not path.exists():
        return False
    with path.open("a+") as file:
        return _take(file, False) is not None


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
