"""Where one run's work goes on CPUs: a device a core with a thread each, rather than one device whose threads share."""

import os
from collections.abc import Sequence

import jax

_MOST_DEVICES = 8  # each holds the whole state
_FLAGS = ("--xla_force_host_platform_device_count", "--xla_cpu_multi_thread_eigen")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(batches_sequences: Sequence[int]) -> None:
    """Has JAX's CPU backend, once it starts, show as many devices of one thread as there are cores.

    Fewer where only fewer divide every batch, down to more than half; otherwise nothing changes, as where a run has
    several processes, or XLA_FLAGS say how many devices or threads there are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.distributed.is_initialized() or any(name in flags for name in _FLAGS):
        return
    cores = num_cores()
    if cores > _MOST_DEVICES:
        return
    dividing = [n for n in range(cores, cores // 2, -1) if all(batch % n == 0 for batch in batches_sequences)]
    if dividing and dividing[0] > 1:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAGS[0]}={dividing[0]} {_FLAGS[1]}=false"
