"""What asks a process to end: Ctrl-C; SIGTERM, which preempted machines and schedulers send; a machine's notice."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from scaling_jax.training import notices

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Asked:
    """Called, it tells whether it has come, for `should_stop`."""

    def __init__(self) -> None:
        self.by_hand = False  # by Ctrl-C
        self.why = ""  # in words, where a notice came
        self._event = threading.Event()

    def __call__(self) -> bool:
        return self._event.is_set()

    def take(self, number: int) -> None:
        self.by_hand = number == signal.SIGINT
        self._event.set()

    def take_notice(self, why: str) -> None:
        self.why = why
        self._event.set()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Asked]:
    """Yields what tells whether the process is asked to end; a second signal acts as it always does."""
    asked = Asked()
    notices.watch(asked.take_notice)
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield asked
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def ask(number, frame):
        asked.take(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in _SIGNALS:
            signal.signal(number, ask)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
