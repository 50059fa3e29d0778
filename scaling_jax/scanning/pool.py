"""Worker processes, one a core, that train the groups of a scan.

On two cores a process pinned to each trained small models 1.4 to 2.5 times as fast as one process over both
(benchmarks/placement.py).
"""

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scaling_jax.errors import UserError

Event = dict[str, Any]


def available_cores() -> Sequence[int | None]:
    """Cores this process may use; None where the system can't pin processes."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * (os.cpu_count() or 1)


def run_groups(
    workdir: Path,
    groups: Iterable[int],
    on_event: Callable[[Event], None],
    cores: Sequence[int | None],
    lock: int | None = None,
    platform: str | None = "cpu",
) -> None:
    """Trains the groups, first come first served, with a worker on each of `cores`.

    Args:
      lock: a file descriptor that workers keep open as long as they may write.
      platform: JAX's; None leaves it to JAX, which prefers accelerators.

    Raises:
      UserError: what a worker refused, or that it died and where its log is.
      KeyboardInterrupt: after the workers have saved their runs and left.
    """
    waiting = list(groups)
    events: queue.Queue[tuple[_Worker, Event | None]] = queue.Queue()
    workers = [_Worker(workdir, core, events, lock, platform) for core in cores[: len(waiting)]]
    try:
        for worker in workers:
            worker.give(waiting.pop(0))
        busy = len(workers)
        while busy:
            worker, event = events.get()
            if event is None:
                raise UserError(f"a worker died (exit code {worker.process.wait()}); its log: {worker.log}")
            if event["event"] == "refused":
                raise UserError(event["message"])
            on_event(event)
            if event["event"] == "done":
                if waiting:
                    worker.give(waiting.pop(0))
                else:
                    busy -= 1
    except KeyboardInterrupt:
        on_event({"event": "stopping"})
        raise
    finally:
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.process.wait()
            if worker.log.exists() and worker.log.stat().st_size == 0:
                worker.log.unlink()


class _Worker:
    def __init__(self, workdir: Path, core: int | None, events: queue.Queue, lock: int | None, platform: str | None):
        self.log = workdir / "logs" / f"worker-{socket.gethostname()}-{os.getpid()}-{core}.log"
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "scaling_jax.scanning.worker", str(workdir)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(platform),
                pass_fds=() if lock is None else (lock,),
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then dismisses the workers
            )
        if core is not None:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self.process.pid, {core})
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def give(self, group: int) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed by its output's end
            self.process.stdin.write(f"{group}\n")
            self.process.stdin.flush()

    def dismiss(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _listen(self, events: queue.Queue) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # not ours: some library printed
                events.put((self, json.loads(line)))
        events.put((self, None))


def _environment(platform: str | None) -> dict[str, str]:
    """On CPUs one thread, one device; this package: whatever the parent's flags are, results are the same."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    package_root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    chosen = os.environ if platform is None else os.environ | {"JAX_PLATFORMS": platform}
    return chosen | {
        "XLA_FLAGS": f"{flags} --xla_cpu_multi_thread_eigen=false".strip(),
        "PYTHONPATH": path,
    }
