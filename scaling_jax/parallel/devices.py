"""One per-device body, run on every device: pmap by default, shard_map or virtual replicas with the same numbers.

The devices are those of all processes of the run (`processes.connect`), each process's beside each other.
"""

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scaling_jax.io.stores import cache_folder
from scaling_jax.io.workers import available_cores

AXIS = "data"
_RUNS = "runs"
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

    axes = [(AXIS,) if s else () for s in split]
    mesh = data_mesh(devices or _devices(num_devices))
    compiled = _shard_map(body, mesh, axes, (AXIS,) if split_outputs else (), donate_argnums)
    return compiled if jax.process_count() == 1 else _placing(compiled, split, split_outputs, num_devices)


def spmd_of_runs(
    body: Callable,
    *,
    split: Sequence[Literal[0, 1, 2]],
    num_runs: int,
    num_devices: int,
    donate_argnums: tuple[int, ...] = (),
) -> Callable:
    """Compiles `body` for a mesh of `num_runs` × `num_devices` of this process's devices, by shard_map.

    Each row of the mesh has runs of its own, and shares their batches along `AXIS`.

    Args:
      body: its outputs must be equal along `AXIS`; they are returned with a leading axis [num_runs, …].
      split: for each argument, how many leading axes of [num_runs, num_devices, …] it has, which are dealt out.
    """
    devices = np.array(_devices(num_runs * num_devices)).reshape(num_runs, num_devices)
    mesh = Mesh(devices, (_RUNS, AXIS), axis_types=(AxisType.Auto,) * 2)
    return _shard_map(body, mesh, [(_RUNS, AXIS)[:s] for s in split], (_RUNS,), donate_argnums)


def replicate(tree: Any, num_devices: int) -> Any:
    """Copies of every array on `num_devices` of each process, placed once instead of at every call."""
    return _place(tree, num_devices, PartitionSpec())


def deal_out(tree: Any, num_devices: int) -> Any:
    """This process's arrays [num_devices, …], a part on each of its devices: what `spmd` splits, placed beforehand."""
    return _place(tree, num_devices, PartitionSpec(AXIS))


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices along the one axis `AXIS`."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _shard_map(
    body: Callable,
    mesh: Mesh,
    split: Sequence[tuple[str, ...]],
    split_outputs: tuple[str, ...],
    donate_argnums: tuple[int, ...],
) -> Callable:
    """`body` on every device of a mesh; the axes named are leading axes of arguments and outputs, dealt out."""

    def local(*args):
        shares = (jax.tree.map(operator.itemgetter((0,) * len(s)), arg) for arg, s in zip(args, split, strict=True))
        return jax.tree.map(lambda x: x[(None,) * len(split_outputs)], body(*shares))

    in_specs, out_specs = tuple(PartitionSpec(*axes) for axes in split), PartitionSpec(*split_outputs)
    # With the default check_vma, gradients inside the body would silently be summed over devices.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(
        sharded,
        donate_argnums=donate_argnums,
        # Said again, as arguments may lie on a mesh of other axes over the same devices.
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in in_specs),
        out_shardings=NamedSharding(mesh, out_specs),
    )


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
