"""Language modelling: the loss of a batch, and the test loss, on the same held-out rows at every evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_jax.parallel import AXIS
from scaling_jax.parallel.devices import device_by_device
from scaling_jax.tasks.models import Model, as_evaluated, network

_CHUNK = 16  # rows at a time; few enough for a CPU's cache
_CHUNK_OF_EACH = 4  # rows at a time on each device, if the devices share the parameters


def batch_loss(model: Model):
    """The training loss: `(params, tokens [B, T + 1]) -> nats per token`."""
    module = network(model)

    def loss(params, tokens_BxT1):
        tokens_BxT1 = tokens_BxT1.astype(jnp.int32)
        return module.apply({"params": params}, tokens_BxT1[:, :-1], tokens_BxT1[:, 1:])

    return loss


def held_out_rows(test_RxT1: np.ndarray, eval_tokens: int) -> np.ndarray:
    """About `eval_tokens` tokens in whole rows: a random choice from the whole test split, the same every time."""
    context = test_RxT1.shape[1] - 1
    count = max(1, min(len(test_RxT1), eval_tokens // context))
    if count > _CHUNK:
        count -= count % _CHUNK
    return test_RxT1[np.sort(np.random.default_rng(0).permutation(len(test_RxT1))[:count])]


@functools.cache
def evaluator(model: Model):
    """The compiled test loss: `(params, rows [R, T + 1]) -> nats per token`. R is at most 16, or a multiple of 16."""
    loss = batch_loss(as_evaluated(model))

    def evaluate(params, rows_RxT1):
        chunks = rows_RxT1.reshape(-1, min(_CHUNK, len(rows_RxT1)), rows_RxT1.shape[1])
        return jnp.mean(jax.lax.map(lambda chunk: loss(params, chunk), chunks))

    return jax.jit(evaluate)


def shared_evaluator(model: Model, mesh: Mesh):
    """`evaluator` with the chunks of rows dealt out to the devices, which all hold the parameters.

    Each device computes its chunks, and their losses are averaged in the same order, as `evaluator` does.
    """
    loss = batch_loss(as_evaluated(model))

    def of_chunks(params, chunks):
        return jax.lax.map(lambda chunk: loss(params, chunk), chunks)

    over_devices = jax.shard_map(
        of_chunks,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(AXIS),
        check_vma=False,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())

    def evaluate(params, rows_RxT1):
        chunks = rows_RxT1.reshape(-1, min(_CHUNK, len(rows_RxT1)), rows_RxT1.shape[1])
        padded = jnp.pad(chunks, ((0, -len(chunks) % mesh.size), (0, 0), (0, 0)))
        losses = jax.lax.with_sharding_constraint(over_devices(params, padded), everywhere)
        return jnp.mean(losses[: len(chunks)])

    return jax.jit(evaluate, out_shardings=everywhere)


def fsdp_evaluator(model: Model, mesh: Mesh, params):
    """`evaluator` for parameters that lie in parts on all devices. The devices share the rows, whose number may be any.

    Args:
      params: shardings of the parameters.
    """
    loss = batch_loss(as_evaluated(model))

    def each_row(params, rows_RxT1):
        return jax.vmap(lambda row_T1: loss(params, row_T1[None]))(rows_RxT1)

    losses = device_by_device(each_row, mesh, params)

    def evaluate(params, rows_RxT1):
        num_rows, context1 = rows_RxT1.shape
        of_each = min(_CHUNK_OF_EACH, -(-num_rows // mesh.size))
        padded = jnp.pad(rows_RxT1, ((0, -num_rows % (of_each * mesh.size)), (0, 0)))
        chunks = padded.reshape(-1, of_each * mesh.size, context1)
        return jnp.mean(jax.lax.map(lambda chunk: losses(params, chunk), chunks).reshape(-1)[:num_rows])

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(evaluate, in_shardings=(params, everywhere), out_shardings=everywhere)
