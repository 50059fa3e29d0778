"""Worker processes: they read jobs as JSON lines on standard input, and answer with JSON lines on standard output.

A worker ends when its input ends, because the parent process stops or has died.
"""

import contextlib
import dataclasses
import errno
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_jax.io import UserError
from scaling_jax.io.files import open_plain

Message = dict[str, Any]

_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")  # the line of a traceback that says what went wrong
_LONGEST_REASON = 300  # characters


@dataclasses.dataclass(frozen=True)
class Command:
    """How to start a worker: `python -P <arguments>`."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] | None = None  # None: the parent's
    core: int | None = None  # pin the process to this core
    log: Path | None = None  # file for standard error; removed if it stays empty
    lock: int | None = None  # descriptor of a lock file, so that the worker holds the lock until it ends


def available_cores() -> Sequence[int | None]:
    """The cores that this process may use; a None for each core if the system can't pin processes."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * (os.cpu_count() or 1)


def run_jobs(
    jobs: Sequence[Any],
    commands: Sequence[Command],
    *,
    on_done: Callable[[Any], None],
    on_message: Callable[[Message], None] = lambda _: None,
    on_interrupt: Callable[[], None] = lambda: None,
    further: Callable[[Any], Sequence[Any]] = lambda job: (),
) -> None:
    """Gives the jobs, in order, to the next free worker. Returns when all jobs are done.

    Args:
      on_done: called with each job that is done.
      on_message: called with each message that a worker sends during a job.
      on_interrupt: called at once on Ctrl-C, before waiting for the workers.
      further: called with each job that is done, after `on_done`; returns the jobs that can be done only now. They come
        first.

    Raises:
      UserError: if a worker raised it, failed or died. Names the error, or the signal, and the worker's log.
      OSError: if a worker couldn't write.
      KeyboardInterrupt: after the workers have ended.
    """
    waiting = list(jobs)
    messages: queue.Queue[tuple[_Worker, Message | None]] = queue.Queue()
    workers: list[_Worker] = []
    free: list[_Worker] = []

    def hand_out() -> None:
        while waiting and (free or len(workers) < len(commands)):
            if not free:
                workers.append(_Worker(commands[len(workers)], messages))
                free.append(workers[-1])
            free.pop().give(waiting.pop(0))

    try:
        hand_out()
        while len(free) < len(workers):
            worker, message = messages.get()
            if message is None:
                raise UserError(worker.last_words())
            if "refused" in message:
                raise UserError(message["refused"])
            if "failed" in message:
                raise UserError(worker.last_words(message["failed"]))
            if "errno" in message:
                raise OSError(message["errno"], message["error"], message["filename"])
            if "done" not in message:
                on_message(message)
                continue
            on_done(worker.job)
            free.append(worker)
            waiting[:0] = further(worker.job)
            hand_out()
    except KeyboardInterrupt:
        on_interrupt()
        raise
    finally:
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.join()


class _Worker:
    def __init__(self, command: Command, messages: queue.Queue):
        self._command = command
        self.job: Any = None
        with contextlib.ExitStack() as files:
            log = None
            if command.log is not None:
                command.log.parent.mkdir(parents=True, exist_ok=True)
                log = files.enter_context(open_plain(command.log, "w"))
            self.process = subprocess.Popen(
                [sys.executable, "-P", *command.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_with_package(os.environ if command.environment is None else command.environment),
                pass_fds=() if command.lock is None else (command.lock,),
                start_new_session=True,  # only the parent gets Ctrl-C; it then dismisses the workers
            )
        if command.core is not None:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self.process.pid, {command.core})
        self._listener = threading.Thread(target=self._listen, args=(messages,), daemon=True)
        self._listener.start()

    def give(self, job: Any) -> None:
        self.job = job
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has died; the end of its output will show this
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def dismiss(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def join(self) -> None:
        self.process.wait()
        self._listener.join()
        log = self._command.log
        if log is not None and log.exists() and log.stat().st_size == 0:
            log.unlink()

    def last_words(self, reason: str = "") -> str:
        """How the worker ended, and why: `reason`, which it sent, else the last error in its log."""
        died, log = f"a worker died ({_exit(self.process.wait())})", self._command.log
        if log is not None:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if _ERROR.match(line)]
            reason = reason or (errors or lines or ["it left no message"])[-1]
            return f"{died}: {reason}; see its log {log}"
        return f"{died}{': ' + reason if reason else ''}; run the same command again to continue"

    def _listen(self, messages: queue.Queue) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):  # a library printed this line
                    message = json.loads(line)
                    if isinstance(message, dict):
                        messages.put((self, message))
        messages.put((self, None))


def serve(work: Callable[[Any, Callable[[Message], None]], bool], on_end: Callable[[], None]) -> None:
    """The main loop of a worker: does the jobs from standard input one after another, until the input ends.

    Args:
      work: `(job, send) -> bool`: True if the job is done; False ends the worker. `send(message)` sends a message to
        `on_message` in the parent. A UserError or OSError ends the worker, and the parent raises it.
      on_end: called from another thread as soon as the input ends; a job may still be running.
    """
    jobs: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(line)
        on_end()
        jobs.put(None)

    answers, sys.stdout = sys.stdout, sys.stderr  # keeps what libraries print out of the answers

    def send(message: Message) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent has died, so the input ends as well
            print(json.dumps(message), file=answers, flush=True)

    threading.Thread(target=listen, daemon=True).start()
    try:
        while (line := jobs.get()) is not None:
            if not work(json.loads(line), send):
                return
            send({"done": True})
    except UserError as error:
        send({"refused": str(error)})
    except OSError as error:  # such as "no space left on device"
        said = error.strerror or str(error)
        send({"errno": error.errno or errno.EIO, "error": said, "filename": error.filename})
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        send({"failed": f"{said[:_LONGEST_REASON]} …" if len(said) > _LONGEST_REASON else said})
        raise  # its traceback goes to the log


def _exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"{name}; the system kills processes if memory runs out" if name == "SIGKILL" else name
    return f"signal {-code}"


def _with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with PYTHONPATH changed so that workers import the same copy of this package."""
    package_root = str(Path(__file__).parents[2])
    return dict(environment) | {
        "PYTHONPATH": os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    }
