"""Runs one function on all devices: a copy on each, or one that is divided between them.

*A copy on each device*: by pmap, by shard_map, or by vmap as virtual devices, all with the same results.
*Divided* (FSDP): the function is written for whole arrays, of which each device holds a part. `jax.jit` divides its
work: parameters are gathered where they are needed, and gradients are reduced to the device that holds their part. So a
model may be larger than the memory of a device.

The devices are those of all processes of the run (`processes.connect`), in the order of the processes. `share_cores`
and `keep_compiled_programs` set up JAX before it starts.
"""

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scaling_jax.io.stores import cache_folder
from scaling_jax.io.workers import available_cores

AXIS = "data"  # name of the mapped axis of devices
Backend = Literal["pmap", "shard_map", "vmap"]
Sharding = Literal["replicated", "fsdp"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)

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


def fsdp_shardings(tree: Any, mesh: Mesh, is_stacked: Callable[[Any], bool] = lambda path: False) -> Any:
    """The sharding of every array of a state: its largest dimension that the devices divide is split over them.

    Vectors, scalars and arrays that the devices don't divide are replicated. Of equal dimensions, takes the first.

    Args:
      tree: arrays or their shapes.
      is_stacked: key path of an array -> True if its leading axis counts layers. This axis stays whole: a device that
        held whole layers would have to send them to all others, one layer after the other.
    """

    def sharding(path, x) -> NamedSharding:
        layers = int(is_stacked(path))
        return NamedSharding(mesh, PartitionSpec(*[None] * layers, *_spec(x.shape[layers:], mesh.size)))

    return jax.tree.map_with_path(sharding, tree)


def over_mesh(body: Callable, mesh: Mesh, *, state: Any, split: Sequence[bool]) -> Callable:
    """Compiles `body(state, *args) -> (state, results)` for whole arrays; donates the state.

    With several processes, arguments are passed as to `spmd`.

    Args:
      state: the shardings of the state, which its result has too, so that the next call finds it as it should be.
      split: for each of the other arguments, True if its leading axis [num_devices, …] is split over the devices.
    """
    shardings = [_over(mesh, AXIS) if s else _over(mesh) for s in split]
    compiled = jax.jit(body, donate_argnums=0, in_shardings=(state, *shardings), out_shardings=(state, _over(mesh)))
    return compiled if jax.process_count() == 1 else placing(compiled, (False, *split), False, mesh.size)


def rows_of_devices(mesh: Mesh, own_rows: bool) -> Callable:
    """`(rows, order [num_devices, B]) -> batch [num_devices · B, …]`; every device takes its own part of the batch.

    Args:
      own_rows: rows are [num_devices, R, …], and a device's part of `order` indexes its own; False for rows [R, …] on
        every device.
    """

    def local(rows, order_1xB):
        return rows_at(jax.tree.map(lambda x: x[0], rows) if own_rows else rows, order_1xB[0])

    in_specs = PartitionSpec(AXIS) if own_rows else PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(AXIS))


def rows_at(rows: Any, index: jax.Array) -> Any:
    """The rows with these indices, of an array or a pytree of arrays."""
    return jax.tree.map(lambda x: x[index], rows)


def device_by_device(fn: Callable, mesh: Mesh, params: Any) -> Callable:
    """`(params, batch) -> fn's results [num_devices, …]`: fn computes with the whole parameters, each device's part.

    So a loss that works in chunks of its batch cuts each device's part, and not the whole batch, into chunks. In fn,
    `use_whole` gathers parameters.

    Args:
      params: shardings of the parameters; their gradients get the same.
    """

    def part_of_each(x):
        return jax.lax.with_sharding_constraint(x.reshape(mesh.size, -1, *x.shape[1:]), _over(mesh, AXIS))

    def results(sharded_params, batch):
        sharded_params = jax.lax.with_sharding_constraint(sharded_params, params)
        parts = jax.tree.map(part_of_each, batch)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.vmap(fn, (None, 0), spmd_axis_name=AXIS)(sharded_params, parts)

    return results


def use_whole(fn: Callable, w: jax.Array, *args) -> Any:
    """`fn(w, *args)` for a parameter that may lie in parts on the devices. Models call it where they use a parameter.

    Inside `device_by_device` the devices gather the parameter here, and the backward pass gathers it again, so that no
    device keeps it. XLA alone might instead gather activations, or cut them along another dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names or mesh.are_all_axes_manual:
        return fn(w, *args)
    w = jax.lax.with_sharding_constraint(w, _spec(w.shape, mesh.size))  # what the backward pass keeps, and the gradient
    return jax.checkpoint(lambda w, *args: fn(_gathered(w), *args))(w, *args)


@jax.custom_vjp
def _gathered(w):
    return jax.lax.with_sharding_constraint(w, PartitionSpec())


# The gradient stays as it is: constrained like w, every device would get the whole of it.
_gathered.defvjp(lambda w: (_gathered(w), None), lambda _, g: (g,))


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


def _spec(shape: tuple[int, ...], num_devices: int) -> PartitionSpec:
    dividing = [k for k, size in enumerate(shape) if len(shape) >= 2 and size % num_devices == 0]
    if not dividing or num_devices == 1:
        return PartitionSpec()
    largest = max(dividing, key=lambda k: shape[k])
    return PartitionSpec(*[None] * largest, AXIS)


def _over(mesh: Mesh, *axes: str) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))
