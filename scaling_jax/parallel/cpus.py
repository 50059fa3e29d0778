"""What JAX is told before it starts: CPUs as a device a core with a thread each; compiled programs are kept."""

import os
from collections.abc import Sequence

import jax

from scaling_jax.io.stores import cache_folder
from scaling_jax.io.workers import available_cores

_MOST_DEVICES = 8  # each holds the whole state
_FLAGS = ("--xla_force_host_platform_device_count", "--xla_cpu_multi_thread_eigen")


def share_cores(batches_sequences: Sequence[int]) -> None:
    """Has JAX's CPU backend, once it starts, show as many devices of one thread as there are cores.

    Fewer where only fewer divide every batch, down to more than half; otherwise nothing changes, as where a run has
    several processes, or XLA_FLAGS say how many devices or threads there are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.distributed.is_initialized() or any(name in flags for name in _FLAGS):
        return
    cores = len(available_cores())
    if cores > _MOST_DEVICES:
        return
    dividing = [n for n in range(cores, cores // 2, -1) if all(batch % n == 0 for batch in batches_sequences)]
    if dividing and dividing[0] > 1:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAGS[0]}={dividing[0]} {_FLAGS[1]}=false"


def keep_compiled_programs() -> None:
    """From now on, a program that any process of this user compiled before is not compiled again.

    They are kept where JAX was told to (JAX_COMPILATION_CACHE_DIR), else in the package's cache folder.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
