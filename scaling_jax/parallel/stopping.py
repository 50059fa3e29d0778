"""What asks a process to end: Ctrl-C; SIGTERM, which preempted machines and schedulers send; a machine's notice."""

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    watch_notices(asked.take_notice)
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


_MADE_BY = Path("/sys/class/dmi/id/product_name")  # Google Compute Engine, also on TPU VMs
_LONGEST_WAIT = 300  # seconds, for the metadata server to answer that nothing has changed
_RETRY_SECONDS = 5.0


def watch_notices(tell: Callable[[str], None]) -> None:
    """Calls `tell` with what will happen, from a thread, once a notice comes; on others' machines never.

    A notice that is there already isn't told: whoever is started in spite of it trains until the end.
    """
    host = os.environ.get("GCE_METADATA_HOST") or ("metadata.google.internal" if _on_google() else None)
    if host is not None:
        threading.Thread(target=_watch, args=(host, tell), daemon=True, name="notices").start()


def _watch(host: str, tell: Callable[[str], None]) -> None:
    answers = map(_notice, _instance(host))
    before = next(answers)
    for notice in answers:
        if notice and not before:
            return tell(notice)
        before = notice


def _notice(instance: dict[str, Any]) -> str | None:
    if instance.get("preempted") == "TRUE":
        return "this machine is preempted"
    if instance.get("maintenanceEvent") == "TERMINATE_ON_HOST_MAINTENANCE":
        return "this machine ends for maintenance"
    return None


def _instance(host: str) -> Iterator[dict[str, Any]]:
    """What the metadata server says of the machine, now and whenever it changes."""
    etag = "0"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        query = f"recursive=true&wait_for_change={'true' if etag != '0' else 'false'}&last_etag={etag}"
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/instance/?{query}&timeout_sec={_LONGEST_WAIT}",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with direct.open(request, timeout=_LONGEST_WAIT + 30) as answer:
                etag = answer.headers.get("ETag", "0")
                found = json.load(answer)
        except (OSError, ValueError):  # it restarts now and then
            time.sleep(_RETRY_SECONDS)
            continue
        yield found


def _on_google() -> bool:
    try:
        return "Google" in _MADE_BY.read_text()
    except OSError:
        return False
