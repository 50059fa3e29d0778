"""Programs that run on all devices of all processes of a run, and how these processes work together."""

from scaling_jax.parallel.devices import (
    AXIS,
    Backend,
    Sharding,
    data_mesh,
    deal_out,
    replicate,
    spmd,
    spmd_of_runs,
    use_whole,
)
from scaling_jax.parallel.processes import agree, connect, from_first, is_first, leave_if_one_is_gone, together

__all__ = [
    "AXIS",
    "Backend",
    "Sharding",
    "agree",
    "connect",
    "data_mesh",
    "deal_out",
    "from_first",
    "is_first",
    "leave_if_one_is_gone",
    "replicate",
    "spmd",
    "spmd_of_runs",
    "together",
    "use_whole",
]
