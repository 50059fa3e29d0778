"""Runs one function over arrays that all devices share (FSDP): each device holds a part of every large array.

The function is written for whole arrays, and `jax.jit` divides its work: parameters are gathered where they are needed,
and gradients are reduced to the device that holds their part. So a model may be larger than the memory of a device.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_jax.parallel.devices import AXIS, placing

Sharding = Literal["replicated", "fsdp"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)


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
        return (rows[0] if own_rows else rows)[order_1xB[0]]

    in_specs = PartitionSpec(AXIS) if own_rows else PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(AXIS))


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


def _spec(shape: tuple[int, ...], num_devices: int) -> PartitionSpec:
    dividing = [k for k, size in enumerate(shape) if len(shape) >= 2 and size % num_devices == 0]
    if not dividing or num_devices == 1:
        return PartitionSpec()
    largest = max(dividing, key=lambda k: shape[k])
    return PartitionSpec(*[None] * largest, AXIS)


def _over(mesh: Mesh, *axes: str) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))
