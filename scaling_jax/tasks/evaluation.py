"""The test loss, or another metric: on the same held-out examples at every evaluation, some at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_jax.parallel import AXIS
from scaling_jax.parallel.devices import device_by_device
from scaling_jax.tasks.trainable import trainable

_CHUNK = 16  # rows of text at a time
_CHUNK_OF_EACH = 4  # rows at a time on each device, if the devices share the parameters


def held_out_rows(test_RxT1: np.ndarray, eval_tokens: int) -> np.ndarray:
    """About `eval_tokens` tokens in whole rows: a random choice from the whole test split, the same every time."""
    context = test_RxT1.shape[1] - 1
    count = max(1, min(len(test_RxT1), eval_tokens // context))
    if count > _CHUNK:
        count -= count % _CHUNK
    return test_RxT1[chosen(len(test_RxT1), count)]


def chosen(num_examples: int, count: int) -> np.ndarray:
    """Indices of `count` held-out examples, rising: a random choice, the same every time."""
    return np.sort(np.random.default_rng(0).permutation(num_examples)[:count])


@functools.cache
def evaluator(model: Any):
    """The compiled metric of a model or task: `(variables, examples [R, …]) -> nats per token, or the metric's unit`.

    Examples that don't fill the last chunk of `evaluation_batch` are evaluated by themselves.
    """
    task = trainable(model)

    def evaluate(variables, examples):
        chunks, rest = _in_chunks(examples, task.evaluation_batch)
        found = jax.lax.map(lambda chunk: task.evaluate(variables, chunk), chunks)
        return _mean(found, chunks, None if rest is None else task.evaluate(variables, rest), rest)

    return jax.jit(evaluate)


def shared_evaluator(model: Any, mesh: Mesh):
    """`evaluator` with the chunks of examples dealt out to the devices, which all hold the variables.

    Each device computes its chunks, and their losses are averaged in the same order, as `evaluator` does.
    """
    task = trainable(model)

    def of_chunks(variables, chunks):
        return jax.lax.map(lambda chunk: task.evaluate(variables, chunk), chunks)

    over_devices = jax.shard_map(
        of_chunks,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(AXIS),
        check_vma=False,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())

    def evaluate(variables, examples):
        chunks, rest = _in_chunks(examples, task.evaluation_batch)
        num_chunks = _count(chunks)
        padded = jax.tree.map(lambda x: _padded(x, -num_chunks % mesh.size), chunks)
        losses = jax.lax.with_sharding_constraint(over_devices(variables, padded), everywhere)
        found = jax.tree.map(lambda x: x[:num_chunks], losses)
        return _mean(found, chunks, None if rest is None else task.evaluate(variables, rest), rest)

    return jax.jit(evaluate, out_shardings=everywhere)


def fsdp_evaluator(model: Any, mesh: Mesh, params):
    """`evaluator` for parameters that lie in parts on all devices. They share the examples, whose number may be any.

    Args:
      params: shardings of the parameters.
    """
    task = trainable(model)

    def each(params, examples):
        return jax.vmap(lambda one: task.evaluate(params, jax.tree.map(lambda x: x[None], one)))(examples)

    losses = device_by_device(each, mesh, params)

    def evaluate(params, examples):
        num_rows = _count(examples)
        of_each = min(_CHUNK_OF_EACH, -(-num_rows // mesh.size))
        padded = jax.tree.map(lambda x: _padded(x, -num_rows % (of_each * mesh.size)), examples)
        chunks = jax.tree.map(lambda x: x.reshape(-1, of_each * mesh.size, *x.shape[1:]), padded)
        found = jax.lax.map(lambda chunk: losses(params, chunk), chunks)
        rows = jax.tree.map(lambda x: x.reshape(-1)[:num_rows], found)
        return _mean(rows, examples, None, None)

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(evaluate, in_shardings=(params, everywhere), out_shardings=everywhere)


def _in_chunks(examples, size: int) -> tuple[Any, Any]:
    """([C, size, …], the rest [R, …] or None)."""
    count = _count(examples)
    size = min(size, count)
    whole = count - count % size
    chunks = jax.tree.map(lambda x: (x if whole == count else x[:whole]).reshape(-1, size, *x.shape[1:]), examples)
    return chunks, None if whole == count else jax.tree.map(lambda x: x[whole:], examples)


def _mean(found, chunks, last, rest):
    """The mean over all examples, from what was found of each chunk and of the rest: means or `(sums, weights)`."""
    if isinstance(found, (tuple, list)):
        total, weight = (jnp.sum(x) for x in found)
        return total / weight if last is None else (total + last[0]) / (weight + last[1])
    if last is None:
        return jnp.mean(found)
    num_first, num_rest = _count(chunks) * jax.tree.leaves(chunks)[0].shape[1], _count(rest)
    return (jnp.mean(found) * num_first + last * num_rest) / (num_first + num_rest)


def _padded(x, more: int):
    return jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1)))


def _count(tree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]
