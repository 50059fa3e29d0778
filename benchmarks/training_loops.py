"""What does the noise scale cost in each of the loops of docs/training_loop.md?

    python benchmarks/training_loops.py

Each line is a training step (gradient and Adam) with the noise scale over the same step without it, on eight virtual
CPU devices: interleaved pairs of a number of steps, in one process; medians of the pairs' ratios, and their quartiles.
Ratios of processor time, which others on the machine disturb less, and of wall time. Virtual devices share cores, so
messages between them cost little: next to the ratios stand the collectives in both compiled steps, which cost the same
anywhere. Each counts once, also inside a loop.

Takes 10 to 15 minutes on two CPU cores.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from scaling_jax.compile.ahead_of_time import collectives
from scaling_jax.noise_scale import Accumulator, taps, value_and_grad

ROUNDS, STEPS = 15, 10
BATCH, LENGTH, WIDTH, LAYERS, VOCABULARY = 64, 64, 128, 2, 256
MICROBATCHES = 4
OPTIMIZER = optax.adam(1e-3)
MESH = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
SPLIT, WHOLE = NamedSharding(MESH, P("data")), NamedSharding(MESH, P())


def init() -> dict:
    """Layers of the shapes of a transformer's feed-forward layers."""
    draws = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draws.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    layers = [{"into": normal(WIDTH, 4 * WIDTH), "out": normal(4 * WIDTH, WIDTH)} for _ in range(LAYERS)]
    return {"embedding": normal(VOCABULARY, WIDTH), "layers": layers, "head": normal(WIDTH, VOCABULARY)}


def loss_fn(params, tokens):
    x = taps.embed(params["embedding"], tokens[:, :-1])
    for layer in params["layers"]:
        x = x + taps.einsum("btf,fd->btd", jax.nn.gelu(taps.einsum("btd,df->btf", x, layer["into"])), layer["out"])
    logits = taps.einsum("btd,dv->btv", x, params["head"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def gathered_loss(gather, shards, tokens):
    return loss_fn(jax.tree.map(gather, shards, is_leaf=lambda x: hasattr(x, "probe")), tokens)


def accumulated(params, batch, step):
    """Gradient accumulation as one writes it for sharded arrays without a noise scale."""

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, part)), None

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    parts = jnp.swapaxes(batch.reshape(-1, MICROBATCHES, *batch.shape[1:]), 0, 1)  # each lies on all devices
    parts = jax.lax.with_sharding_constraint(parts, NamedSharding(MESH, P(None, "data")))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / MICROBATCHES, total)


def plain(params, batch, step):
    return jax.value_and_grad(loss_fn)(params, batch)


def measured(every=None, **options):
    fn = value_and_grad(loss_fn, batch_sharding=SPLIT, every=every, **options)

    def with_moments(params, batch, step):
        (loss, moments), grads = fn(params, batch, **({} if every is None else {"step": step}))
        return (loss, moments), grads

    return with_moments


def by_shard_map(fn, params):
    def of_device(params, batch, step):
        return fn(params, batch)

    in_specs, out_specs = (params, P("data"), P()), (P(), params)
    return jax.shard_map(of_device, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def plain_on_device(params, batch):
    return jax.lax.pmean(jax.value_and_grad(loss_fn)(params, batch), "data")


def plain_fsdp(shards, batch):
    """Gradients come back through all_gather as sums over devices."""
    gather = partial(jax.lax.all_gather, axis_name="data", tiled=True)
    loss, grads = jax.value_and_grad(partial(gathered_loss, gather))(shards, batch)
    return jax.lax.pmean(loss, "data"), jax.tree.map(lambda g: g / 8, grads)


measured_fsdp = value_and_grad(partial(gathered_loss, partial(taps.all_gather, axis_name="data")), axis_name="data")


class Loop(NamedTuple):
    """`step(state, batch, i) -> (state, what was measured)`."""

    step: Callable
    state: Any


def loop(gradient, sharding) -> Loop:
    def step(state, batch, i):
        params, opt_state = state
        value, grads = gradient(params, batch, i)
        grads = jax.lax.with_sharding_constraint(grads, sharding)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    params = jax.device_put(init(), sharding)
    averages, nothing = OPTIMIZER.init(params)
    like_params = jax.tree.map(lambda x: sharding, params)
    lies = averages._replace(count=WHOLE, mu=like_params, nu=like_params), nothing
    return Loop(step, (params, jax.device_put((averages, nothing), lies)))


def multi_steps(accumulator) -> Loop:
    """A call has a microbatch; four calls are a step."""
    optimizer = optax.MultiSteps(OPTIMIZER, MICROBATCHES)

    def step(state, batch, i):
        params, opt_state, sums = state
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        if accumulator is not None:
            moments, _, sums = accumulator.update(grads, sums)
            value = value, moments
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, sums), value

    params = jax.device_put(init(), WHOLE)
    sums = () if accumulator is None else accumulator.init(params)
    return Loop(step, jax.device_put((params, optimizer.init(params), sums), WHOLE))


def compiled(loop: Loop, batch):
    return jax.jit(loop.step).lower(loop.state, batch, jnp.int32(0)).compile()


def seconds(executable, state, batch) -> tuple[float, float]:
    """(processor seconds, wall seconds) of STEPS steps."""
    steps = [jax.device_put(jnp.int32(i), WHOLE) for i in range(STEPS)]
    jax.block_until_ready(steps)
    cpu, wall = time.process_time(), time.perf_counter()
    for i in steps:
        state, value = executable(state, batch, i)
    jax.block_until_ready((state, value))
    return time.process_time() - cpu, time.perf_counter() - wall


def counts(executable) -> str:
    found = Counter(c.kind for c in collectives(executable.as_text()))
    return ", ".join(f"{n} {kind}" for kind, n in sorted(found.items())) or "none"


def lines() -> dict[str, tuple[Loop, Loop]]:
    """{what: (with the noise scale, without it)}"""
    four = {"num_microbatches": MICROBATCHES}
    dp, fsdp = partial(loop, sharding=WHOLE), partial(loop, sharding=SPLIT)
    return {
        "jit, 4 microbatches": (dp(measured(**four)), dp(accumulated)),
        "the same, over a step without microbatches": (dp(measured(**four)), dp(plain)),
        "the same, every=10": (dp(measured(**four, every=10)), dp(accumulated)),
        "jit, FSDP, 4 microbatches": (fsdp(measured(**four)), fsdp(accumulated)),
        "the same, over a step without microbatches ": (fsdp(measured(**four)), fsdp(plain)),
        "jit, devices as small batches": (dp(measured(axis_name="data")), dp(plain)),
        "shard_map": (
            dp(by_shard_map(value_and_grad(loss_fn, axis_name="data"), P())),
            dp(by_shard_map(plain_on_device, P())),
        ),
        "jit, per example": (dp(measured(method="per_example")), dp(plain)),
        "shard_map, FSDP, taps.all_gather": (
            fsdp(by_shard_map(measured_fsdp, P("data"))),
            fsdp(by_shard_map(plain_fsdp, P("data"))),
        ),
        "MultiSteps, Accumulator": (
            multi_steps(Accumulator(num_microbatches=MICROBATCHES, microbatch=BATCH // MICROBATCHES)),
            multi_steps(None),
        ),
    }


def main(rounds: int) -> None:
    batch = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1), np.int32)
    whole, part = jax.device_put(batch, SPLIT), jax.device_put(batch[: BATCH // MICROBATCHES], SPLIT)
    num_params = sum(x.size for x in jax.tree.leaves(init()))
    print(
        f"{num_params:,} parameters, batch of {BATCH} rows of {LENGTH} tokens; {len(os.sched_getaffinity(0))} CPU "
        f"cores, {jax.device_count()} virtual devices; Python {platform.python_version()}, JAX {jax.__version__}; "
        f"{rounds} pairs of {STEPS} steps"
    )
    for what, (with_it, without) in lines().items():
        batch = part if what.startswith("MultiSteps") else whole
        a, b = compiled(with_it, batch), compiled(without, batch)
        seconds(a, with_it.state, batch), seconds(b, without.state, batch)  # once to warm up
        pairs = []
        for i in range(rounds):  # which comes first alternates
            order = ((a, with_it.state), (b, without.state))[:: 1 if i % 2 else -1]
            timed = [seconds(executable, state, batch) for executable, state in order]
            pairs.append(timed[:: 1 if i % 2 else -1])
        times = np.array(pairs)  # seconds, [rounds, with or without, processor or wall]
        milliseconds = 1e3 * np.median(times[:, 1, 1]) / STEPS
        quartiles = np.quantile(times[:, 0] / times[:, 1], (0.25, 0.5, 0.75), axis=0)
        (low, cpu, high), (wall_low, wall, wall_high) = quartiles.T
        print(
            f"{what.strip():44} processor {cpu:.3f} [{low:.3f}, {high:.3f}]  wall {wall:.3f} [{wall_low:.3f}, "
            f"{wall_high:.3f}]  without: {milliseconds:.1f} ms\n    with: {counts(a)}\n    without: {counts(b)}",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
