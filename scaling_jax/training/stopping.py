"""Signals that ask a process to end: Ctrl-C, and SIGTERM, which preempted machines and schedulers send."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields what tells whether such a signal has come, for `should_stop`; a second one acts as it always does."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def ask(number, frame):
        asked.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in _SIGNALS:
            signal.signal(number, ask)
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
