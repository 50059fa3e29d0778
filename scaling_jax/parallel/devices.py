"""Runs one function on every device: by pmap, by shard_map, or by vmap as virtual devices, all with the same results.

The devices are those of all processes of the run (`processes.connect`), in the order of the processes. `share_cores`
and `keep_compiled_programs` set up JAX before it starts.
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

AXIS = "data"  # name of the mapped axis of devices
Backend = Literal["pmap", "shard_map", "vmap"]

_RUNS = "runs"  # name of the second axis, of runs
_MOST_DEVICES = 8  # of a CPU; each device holds the whole training state
_FLAGS = ("--xla_force_host_platform_device_count", "--xla_cpu_multi_thread_eigen")


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
    """Compiles `body` to run on every device; inside, the axis of devices is called `AXIS`.

    With several processes, each process passes the parts [its devices, …] of its own devices for a split argument, and
    all processes pass equal values for the other arguments.

    Args:
      body: sees the part of one device. Its outputs must be equal on all devices, unless `split_outputs` is given.
      split: for each argument, True if its leading axis [num_devices, …] is split over the devices; False if every
        device gets the whole argument.
      num_devices: number of devices of all processes.
      backend: `vmap` runs virtual devices on one device.
      split_outputs: return the outputs of each device, with a leading axis [num_devices, …].
      devices: for `shard_map`, the devices of another machine to compile for; None takes the devices of this run.
    """
    out_axes = 0 if split_outputs else None
    if backend == "pmap":
        mapped = jax.pmap(
            body,
            AXIS,
            in_axes=tuple(0 if s else None for s in split),
            out_axes=out_axes,
            devices=devices_of_run(num_devices),
            donate_argnums=donate_argnums,
        )
        return mapped if jax.process_count() == 1 else placing(mapped, split, split_outputs, num_devices)
    if backend == "vmap":
        mapped = jax.vmap(body, tuple(0 if s else None for s in split), out_axes, axis_name=AXIS, axis_size=num_devices)
        return jax.jit(mapped, donate_argnums=donate_argnums)

    axes = [(AXIS,) if s else () for s in split]
    mesh = data_mesh(devices or devices_of_run(num_devices))
    compiled = _shard_map(body, mesh, axes, (AXIS,) if split_outputs else (), donate_argnums)
    return compiled if jax.process_count() == 1 else placing(compiled, split, split_outputs, num_devices)


def spmd_of_runs(
    body: Callable,
    *,
    split: Sequence[Literal[0, 1, 2]],
    num_runs: int,
    num_devices: int,
    donate_argnums: tuple[int, ...] = (),
) -> Callable:
    """Compiles `body` by shard_map for several runs at once, on a mesh of `num_runs` × `num_devices` of this process.

    Each row of the mesh trains its own runs. The devices of a row split the batches along `AXIS`.

    Args:
      body: its outputs must be equal along `AXIS`; the result has a leading axis [num_runs, …].
      split: for each argument, the number of its leading axes [num_runs, num_devices, …] that are split: 0, 1 or 2.
    """
    devices = np.array(devices_of_run(num_runs * num_devices)).reshape(num_runs, num_devices)
    mesh = Mesh(devices, (_RUNS, AXIS), axis_types=(AxisType.Auto,) * 2)
    return _shard_map(body, mesh, [(_RUNS, AXIS)[:s] for s in split], (_RUNS,), donate_argnums)


def replicate(tree: Any, num_devices: int) -> Any:
    """Places a copy of every array on `num_devices` of each process, so that calls needn't do it each time."""
    return _place(tree, num_devices, PartitionSpec())


def deal_out(tree: Any, num_devices: int) -> Any:
    """Places the parts of this process's arrays [num_devices, …] on its devices; for split arguments of `spmd`."""
    return _place(tree, num_devices, PartitionSpec(AXIS))


def devices_of_run(num_devices: int) -> list[jax.Device]:
    """The first devices of all processes, in the order of the processes."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))[:num_devices]


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of the devices with one axis, `AXIS`, in the order in which they are given."""
    # Not jax.make_mesh, which on TPUs orders devices by their links: each process feeds its own devices, so these must
    # stand together, in the order of the processes. JAX refuses arrays placed in two orders, so all meshes keep this.
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def placing(compiled: Callable, split: Sequence[bool], split_outputs: bool, num_devices: int) -> Callable:
    """`compiled` for several processes: arguments and results are arrays over the devices of all processes.

    The arguments are those of `spmd`.
    """
    out_spec = PartitionSpec(AXIS) if split_outputs else PartitionSpec()
    sharding = NamedSharding(data_mesh(devices_of_run(num_devices)), out_spec)
    own_devices = num_devices // jax.process_count()

    def of_all(x):  # pmap returns only the part of this process
        if not x.is_fully_addressable:
            return x
        shape = (num_devices, *x.shape[1:]) if split_outputs else x.shape
        return jax.make_array_from_single_device_arrays(shape, sharding, [part.data for part in x.addressable_shards])

    def placed_call(*args):
        placed = ((deal_out if s else replicate)(arg, own_devices) for arg, s in zip(args, split, strict=True))
        return jax.tree.map(of_all, compiled(*placed))

    return placed_call


def share_cores(batches_sequences: Sequence[int]) -> None:
    """Sets XLA_FLAGS so that JAX's CPU backend shows one single-threaded device per core. Call it before JAX starts.

    If the number of cores doesn't divide every batch, takes the largest smaller number that does and is more than half
    of the cores. Does nothing if there is no such number, if the run has several processes, or if XLA_FLAGS already set
    the number of devices or threads.
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
    """Caches compiled programs on disk, so that no process of this user compiles a program twice.

    The cache is the folder JAX_COMPILATION_CACHE_DIR if it is set, else a folder in the package's cache folder.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _shard_map(
    body: Callable,
    mesh: Mesh,
    split: Sequence[tuple[str, ...]],
    split_outputs: tuple[str, ...],
    donate_argnums: tuple[int, ...],
) -> Callable:
    """Compiles `body` for every device of a mesh. `split` names the leading axes of each argument that are split."""

    def local(*args):
        shares = (jax.tree.map(operator.itemgetter((0,) * len(s)), arg) for arg, s in zip(args, split, strict=True))
        return jax.tree.map(lambda x: x[(None,) * len(split_outputs)], body(*shares))

    in_specs, out_specs = tuple(PartitionSpec(*axes) for axes in split), PartitionSpec(*split_outputs)
    # With the default check_vma, JAX would sum gradients inside the body over devices, without a warning.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(
        sharded,
        donate_argnums=donate_argnums,
        # Needed because arguments may be placed on a mesh with other axes over the same devices.
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in in_specs),
        out_shardings=NamedSharding(mesh, out_specs),
    )


def _place(tree: Any, num_devices: int, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(data_mesh(devices_of_run(num_devices * jax.process_count())), spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x  # already on the devices of all processes
        # device_put would send every array to the other processes, to compare it with theirs.
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, tree)
