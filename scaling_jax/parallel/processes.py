"""The processes of one run: how they connect, exchange values, and stop on signals, notices or a lost process."""

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from scaling_jax.io import UserError

GONE = 75  # exit code if another process is gone: EX_TEMPFAIL of sysexits.h, "try again"

_CONNECT_SECONDS = 120
_HEARTBEAT_SECONDS = 60
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")  # set by mpirun or srun: number of processes
_PER_MACHINE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")  # such as 1, or 1(x4) on four machines
_LOST = re.compile(r"gloo|nccl|heartbeat|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED", re.IGNORECASE)
_MADE_BY = Path("/sys/class/dmi/id/product_name")  # "Google Compute Engine" there, also on TPU VMs
_LONGEST_WAIT = 300  # seconds after which the metadata server answers even if nothing has changed
_RETRY_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Value = TypeVar("_Value")


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects to the other processes of a run. Does nothing if there are none. Call it before JAX looks at devices.

    Without arguments, JAX finds the other processes: on TPU slices, under `srun` and `mpirun`, and in indexed jobs of
    Kubernetes. A process that is alone on its machine takes all devices there. If several processes share a machine,
    each takes one GPU.

    Args:
      coordinator: host:port on which process 0 listens.
      num_processes: number of all processes.
      process_id: 0 … num_processes - 1.

    Raises:
      UserError: if only some arguments are given, if they are out of range, if the processes don't connect within two
        minutes, or if they have different numbers of devices.
    """
    if jax.distributed.is_initialized():
        return
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(f"give --coordinator, --num-processes and --process-id together: {', '.join(missing)} missing")
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check_address(coordinator)
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process-id {process_id} with --num-processes {num_processes}: processes have numbers from 0 to "
                "--num-processes - 1"
            )
    if num_processes == 1 or (missing and _first_of(_LAUNCHED) == "1"):
        return
    if coordinator is not None and process_id:
        _wait_for(coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, on which we save and stop
    alone_on_machine = re.fullmatch(r"1(\(x\d+\))?", _first_of(_PER_MACHINE) or "")
    withdraw = _last_words(
        f"not all processes of this run connected within {_CONNECT_SECONDS} seconds: start all of them"
    )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=[] if alone_on_machine else None,  # an empty list means all devices
            cluster_detection_method=None if missing else "deactivate",
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if missing and "should be defined" in str(error):  # no cluster
            return
        raise UserError(
            f"can't connect to the other processes of this run ({str(error).splitlines()[0]}): check that all are "
            "started, and reach each other"
        ) from None
    finally:
        withdraw()
    atexit.register(_last_words("a process of this run is gone: run the same command again on all of them"))
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise UserError(
            f"the processes of this run have {sorted(devices.values())} devices: give each process the same number"
        )


def is_first() -> bool:
    """True in the one process of a run that writes the results and prints."""
    return _alone() or jax.process_index() == 0


def agree(*flags: bool) -> tuple[bool, ...]:
    """For each flag, True in all processes if it is True in any process. All processes must call this."""
    if _alone():
        return flags
    return tuple(map(bool, multihost_utils.process_allgather(np.array(flags)).any(axis=0)))


def from_first(value: _Value) -> _Value:
    """The first process's value, in all processes. All processes must call this. The value must be JSON."""
    return value if _alone() else _from(0, value)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Processes leave this block together. If one raises an error inside, the others raise a UserError with its text.

    Inside the block, no process may wait for another.
    """
    if _alone():
        yield
        return
    mistake: Exception | None = None
    try:
        yield
    except Exception as error:
        mistake = error
    with leave_if_one_is_gone():
        here = jax.process_index()
        mistaken = agree(*(mistake is not None and process == here for process in range(jax.process_count())))
        said = _from(mistaken.index(True), str(mistake)) if any(mistaken) else ""
    if any(mistaken):
        raise mistake or UserError(said)


@contextlib.contextmanager
def leave_if_one_is_gone() -> Iterator[None]:
    """Ends this process, with exit code `GONE`, on an error that means that another process has ended.

    It ends at once, because the usual cleanup would wait for the other process.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _alone() and _LOST.search(str(error)):
            os._exit(GONE)  # `_last_words` prints the reason
        raise


class Asked:
    """Returns True once a signal or a notice has asked the process to stop; serves as `should_stop`."""

    def __init__(self) -> None:
        self.by_hand = False  # True for Ctrl-C
        self.why = ""  # the notice, in words; empty for a signal
        self.was_asked = False  # True once training has looked, which is after its first steps
        self._event = threading.Event()

    def __call__(self) -> bool:
        self.was_asked = True
        return self._event.is_set()

    def take(self, number: int) -> None:
        self.by_hand = number == signal.SIGINT
        self._event.set()

    def take_notice(self, why: str) -> None:
        self.why = why
        self._event.set()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Asked]:
    """Yields an `Asked`, which returns True once the process is asked to stop. A second signal then ends it."""
    asked = Asked()
    watch_notices(asked.take_notice)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def ask(number, frame):
        asked.take(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    try:
        for number in _SIGNALS:
            signal.signal(number, ask)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_notices(tell: Callable[[str], None]) -> None:
    """Calls `tell` from a thread, with the reason in words, once Google announces that this machine will end.

    Does nothing on other machines. Ignores a notice that is there from the start: the process was started anyway.
    """
    host = os.environ.get("GCE_METADATA_HOST") or ("metadata.google.internal" if _on_google() else None)
    if host is not None:
        threading.Thread(target=_watch, args=(host, tell), daemon=True, name="notices").start()


def _alone() -> bool:
    """True if there are no other processes. Doesn't look at devices, which would take GPU memory."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def _from(process: int, value: _Value) -> _Value:
    is_source = jax.process_index() == process
    mine = json.dumps(value).encode() if is_source else b""
    num_bytes = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine)), is_source))
    room = np.zeros(1 << max(10, num_bytes.bit_length()), np.uint8)  # powers of 2, as JAX compiles once per size
    room[: len(mine)] = np.frombuffer(mine, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(room, is_source)[:num_bytes].tobytes())


def _first_of(variables: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in variables if name in os.environ), None)


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator {coordinator!r} must be host:port, such as 10.0.0.1:1234")


def _wait_for(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"nothing listens at {coordinator} after {_CONNECT_SECONDS} seconds ({error}): "
                    "is process 0 running there, with the same --coordinator?"
                ) from None
        time.sleep(0.5)


def _last_words(line: str) -> Callable[[], None]:
    """Prints `line` when this process ends, however it ends, unless the function returned was called before.

    A shell prints it: if the coordinator is gone, XLA aborts from its own thread and Python handlers don't run.
    """
    if shutil.which("sh") is None:  # Windows
        return lambda: None
    script = "trap '' INT TERM HUP; read -r withdrawn || echo \"scaling-jax: $0\" >&2"
    shell = subprocess.Popen(["sh", "-c", script, line], stdin=subprocess.PIPE)

    def withdraw() -> None:
        with contextlib.suppress(BrokenPipeError):
            shell.communicate(b"\n")

    return withdraw


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
    """The metadata server's description of this machine, now and after every change."""
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
        except (OSError, ValueError):  # the server restarts now and then
            time.sleep(_RETRY_SECONDS)
            continue
        yield found


def _on_google() -> bool:
    try:
        return "Google" in _MADE_BY.read_text()
    except OSError:
        return False
