"""One per-device body, run on every device: pmap by default, shard_map or virtual replicas with the same numbers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
Backend = Literal["pmap", "shard_map", "vmap"]


def spmd(
    body: Callable,
    *,
    split: Sequence[bool],
    num_devices: int,
    backend: Backend = "pmap",
    donate_argnums: tuple[int, ...] = (),
    split_outputs: bool = False,
) -> Callable:
    """Compiles `body`, which sees one device's share and names the devices' axis `AXIS`.

    Args:
      body: its outputs must be equal on all devices (reduced over `AXIS`), or `split_outputs` given.
      split: for each argument, whether its leading axis [num_devices, …] is dealt out; otherwise every device gets all.
      backend: `vmap` runs virtual replicas on one device.
      split_outputs: whether each device's outputs are returned, with a leading axis [num_devices, …].
    """
    out_axes = 0 if split_outputs else None
    if backend == "pmap":
        return jax.pmap(
            body,
            AXIS,
            in_axes=tuple(0 if s else None for s in split),
            out_axes=out_axes,
            devices=jax.local_devices()[:num_devices],
            donate_argnums=donate_argnums,
        )
    if backend == "vmap":
        mapped = jax.vmap(body, tuple(0 if s else None for s in split), out_axes, axis_name=AXIS, axis_size=num_devices)
        return jax.jit(mapped, donate_argnums=donate_argnums)

    def local(*args):
        shares = (jax.tree.map(lambda x: x[0], arg) if s else arg for arg, s in zip(args, split, strict=True))
        outputs = body(*shares)
        return jax.tree.map(lambda x: x[None], outputs) if split_outputs else outputs

    sharded = jax.shard_map(
        local,
        mesh=_mesh(num_devices),
        in_specs=tuple(PartitionSpec(AXIS) if s else PartitionSpec() for s in split),
        out_specs=PartitionSpec(AXIS) if split_outputs else PartitionSpec(),
        check_vma=False,  # with the default, gradients inside the body would silently be summed over devices
    )
    return jax.jit(sharded, donate_argnums=donate_argnums)


def replicate(tree: Any, num_devices: int) -> Any:
    """Copies of every array on each of the devices, placed once instead of at every call."""
    return jax.device_put(tree, NamedSharding(_mesh(num_devices), PartitionSpec()))


def deal_out(tree: Any, num_devices: int) -> Any:
    """Arrays [num_devices, …], a part on each of the devices: what `spmd` splits, placed before the call."""
    return jax.device_put(tree, NamedSharding(_mesh(num_devices), PartitionSpec(AXIS)))


def _mesh(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.local_devices()[:num_devices]), (AXIS,), axis_types=(AxisType.Auto,))
