"""One per-device body, run on every device: pmap by default, shard_map or virtual replicas with the same numbers.

The devices are those of all processes of the run (`processes.connect`), each process's beside each other.
"""

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
    devices: Sequence[jax.Device] | None = None,
) -> Callable:
    """Compiles `body`, which sees one device's share and names the devices' axis `AXIS`.

    Over several processes each deals out [its devices, …] of its own, and all give the same for the rest.

    Args:
      body: its outputs must be equal on all devices (reduced over `AXIS`), or `split_outputs` given.
      split: for each argument, whether its leading axis [num_devices, …] is dealt out; otherwise every device gets all.
      num_devices: of all processes.
      backend: `vmap` runs virtual replicas on one device.
      split_outputs: whether each device's outputs are returned, with a leading axis [num_devices, …].
      devices: for `shard_map`, those of another machine to compile for; this run's unless given.
    """
    out_axes = 0 if split_outputs else None
    if backend == "pmap":
        mapped = jax.pmap(
            body,
            AXIS,
            in_axes=tuple(0 if s else None for s in split),
            out_axes=out_axes,
            devices=_devices(num_devices),
            donate_argnums=donate_argnums,
        )
        return mapped if jax.process_count() == 1 else _placing(mapped, split, split_outputs, num_devices)
    if backend == "vmap":
        mapped = jax.vmap(body, tuple(0 if s else None for s in split), out_axes, axis_name=AXIS, axis_size=num_devices)
        return jax.jit(mapped, donate_argnums=donate_argnums)

    def local(*args):
        shares = (jax.tree.map(lambda x: x[0], arg) if s else arg for arg, s in zip(args, split, strict=True))
        outputs = body(*shares)
        return jax.tree.map(lambda x: x[None], outputs) if split_outputs else outputs

    sharded = jax.shard_map(
        local,
        mesh=data_mesh(devices or _devices(num_devices)),
        in_specs=tuple(PartitionSpec(AXIS) if s else PartitionSpec() for s in split),
        out_specs=PartitionSpec(AXIS) if split_outputs else PartitionSpec(),
        check_vma=False,  # with the default, gradients inside the body would silently be summed over devices
    )
    compiled = jax.jit(sharded, donate_argnums=donate_argnums)
    return compiled if jax.process_count() == 1 else _placing(compiled, split, split_outputs, num_devices)


def replicate(tree: Any, num_devices: int) -> Any:
    """Copies of every array on `num_devices` of each process, placed once instead of at every call."""
    return _place(tree, num_devices, PartitionSpec())


def deal_out(tree: Any, num_devices: int) -> Any:
    """This process's arrays [num_devices, …], a part on each of its devices: what `spmd` splits, placed beforehand."""
    return _place(tree, num_devices, PartitionSpec(AXIS))


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices along the one axis `AXIS`."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _devices(num_devices: int) -> list[jax.Device]:
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))[:num_devices]


def _place(tree: Any, num_devices: int, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(data_mesh(_devices(num_devices * jax.process_count())), spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x  # it is on all processes' devices already
        # device_put would send the others every array, to compare it with theirs.
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, tree)


def _placing(compiled: Callable, split: Sequence[bool], split_outputs: bool, num_devices: int) -> Callable:
    """`compiled`, over several processes, with arrays of all of them for arguments and results."""
    out_spec = PartitionSpec(AXIS) if split_outputs else PartitionSpec()
    sharding = NamedSharding(data_mesh(_devices(num_devices)), out_spec)
    own_devices = num_devices // jax.process_count()

    def of_all(x):  # pmap returns a process's own part
        if not x.is_fully_addressable:
            return x
        shape = (num_devices, *x.shape[1:]) if split_outputs else x.shape
        return jax.make_array_from_single_device_arrays(shape, sharding, [part.data for part in x.addressable_shards])

    def placing(*args):
        placed = ((deal_out if s else replicate)(arg, own_devices) for arg, s in zip(args, split, strict=True))
        return jax.tree.map(of_all, compiled(*placed))

    return placing
