"""Eight virtual CPU devices and strict numerics for every test; XLA compiles in a hurry (tests/compiling.py).

Scans that tests start as processes compile as users' do; so does everything with
XLA_FLAGS='--xla_backend_optimization_level=3' pytest, and up to jaxlib 0.11.0 --xla_cpu_use_fusion_emitters=true.
"""

import os
import signal
from pathlib import Path

from tests.compiling import IN_A_HURRY

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {IN_A_HURRY} {os.environ.get('XLA_FLAGS', '')}"

import jax

# Tests, their processes and the next time share what is compiled.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_nans", True)
# Eight devices on fewer cores may wait for each other forever if several steps are under way at a time.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# A shell's background job, `pytest &`, ignores Ctrl-C, and tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.made_up_scan", "tests.buckets"]

_LONGEST = ("test_accelerator.py", "test_demo.py", "test_cli.py", "test_report.py", "test_figures.py", "test_truth.py")


def pytest_collection_modifyitems(items):
    """The longest files first, then training's, so that no worker is left with one at the end."""
    items.sort(key=lambda item: (item.path.name not in _LONGEST, item.path.parent.name != "training"))
