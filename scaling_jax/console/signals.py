"""What a command does on Ctrl-C and SIGTERM: it says at once that it heard, saves, and ends with the promised code.

Python's own handlers run only between its instructions, so they wait for a compilation or for a call to a device. A
thread that reads the signal's number from a pipe doesn't.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # exit code after Ctrl-C
_AGAIN_SECONDS = 0.01


def leave(by_hand: bool, say: Callable[[str], None] = print) -> NoReturn:
    """Ends a command after its runs are saved: as Ctrl-C does, or with code 0 after SIGTERM or a notice.

    A script that restarts the command can name a file in SCALING_JAX_SAVED. If the command was stopped, it makes this
    file, so that the script can tell this from a finished command.
    """
    if by_hand:
        raise KeyboardInterrupt from None
    _mark_saved()
    say("saved; run the same command again to continue")
    raise SystemExit(0) from None


@contextlib.contextmanager
def before_training() -> Iterator[None]:
    """SIGTERM ends a command with code 0 while it starts: nothing is trained, so everything is saved.

    Both act even where Python ignores what is raised, as in a callback of the garbage collector (JAX has
    one): then it is sent again. What trains later sets its own handlers. Does nothing outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        leave(by_hand=False)

    def ignored(what: "sys.UnraisableHookArgs") -> None:
        if issubclass(what.exc_type, (KeyboardInterrupt, SystemExit)):
            again = signal.SIGINT if issubclass(what.exc_type, KeyboardInterrupt) else signal.SIGTERM
            threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), again)).start()
        else:
            hook_before(what)

    before, hook_before = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def heard_at_once(say: Callable[[str], None], nothing_to_lose: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Says at once that a signal was heard, and ends the process at once if nothing would be lost.

    Handlers of the signals must be set. Does nothing outside of the main thread.

    Args:
      say: prints a line; called from a thread.
      nothing_to_lose: True before the process has trained a step, as while it compiles.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        heard = False
        while number := os.read(read, 1):
            if number[0] not in SIGNALS or heard:  # a second signal acts as usual
                continue
            heard = True
            name = "Ctrl-C" if number[0] == signal.SIGINT else "SIGTERM"
            if nothing_to_lose():
                _end_now(say, name, by_hand=number[0] == signal.SIGINT)
            say(f"{name}: saving after the call that is running …")

    thread = threading.Thread(target=listen, daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[Callable[[], bool]]:
    """Makes the first SIGTERM act like Ctrl-C. Yields a function that returns True once SIGTERM has come."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield came.is_set
        return
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(*_):
        came.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


class Limits:
    """Minutes and tokens, or None, after which the process gets one SIGTERM. Minutes count from `with` on."""

    def __init__(self, minutes: float | None, tokens: float | None):
        self.minutes, self.tokens = minutes, tokens
        self.reached: str | None = None  # which limit, in words
        self._tokens_of: dict[str, int] = {}  # {run id: tokens}
        self._timer: threading.Timer | None = None

    def count(self, run_id: str, tokens: int) -> None:
        """Takes down how many tokens a run has trained."""
        self._tokens_of[run_id] = tokens
        if self.tokens is not None and sum(self._tokens_of.values()) >= self.tokens:
            self._stop(f"{self.tokens:,.0f} tokens are trained")

    def _stop(self, why: str) -> None:
        if self.reached is None:
            self.reached = why
            os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> Self:
        if self.minutes is not None:
            seconds = min(60 * self.minutes, threading.TIMEOUT_MAX)
            self._timer = threading.Timer(seconds, self._stop, (f"{self.minutes:g} minutes are over",))
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _end_now(say: Callable[[str], None], name: str, by_hand: bool) -> NoReturn:
    """Ends the process from a thread, while its main thread is in a compilation, which nothing else can stop."""
    if not by_hand:
        _mark_saved()
    say(f"{name}: stopped before the first step; run the same command again to continue")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED if by_hand else 0)


def _mark_saved() -> None:
    if marker := os.environ.get("SCALING_JAX_SAVED"):
        Path(marker).touch()
