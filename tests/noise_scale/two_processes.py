"""One of two processes with two CPU devices each: `python -m tests.noise_scale.two_processes PORT PROCESS_ID`."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_cpu_collectives_implementation", "gloo")


def main(port: str, process_id: str):
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process_id))
    from experiments import noisy_quadratic as quadratic
    from scaling_jax.noise_scale import value_and_grad

    x = np.asarray(quadratic.draw(jax.random.key(0), 32))
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    x_global = jax.make_array_from_callback(x.shape, NamedSharding(mesh, P("data")), lambda index: x[index])
    params = jax.device_put(jax.tree.map(np.asarray, quadratic.PARAMS), NamedSharding(mesh, P()))
    for num_microbatches in (1, 2, 4):
        (_, want), want_grads = value_and_grad(quadratic.loss, num_microbatches=4 * num_microbatches, axis_name=())(
            quadratic.PARAMS, x
        )
        fn = value_and_grad(quadratic.loss, num_microbatches=num_microbatches, axis_name="data")
        for check_vma in (False, True):
            mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
            (_, moments), grads = jax.jit(mapped)(params, x_global)
            close(moments, want)
            close(grads, want_grads)
        local = x.reshape(2, 2, 8, *x.shape[1:])[jax.process_index()]
        (_, moments), grads = jax.pmap(fn, "data", in_axes=(None, 0), out_axes=None)(quadratic.PARAMS, local)
        close(moments, want)
        close(grads, want_grads)
    print("agreed on", jax.device_count(), "devices of", jax.process_count(), "processes")


def close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.addressable_data(0), np.asarray(b), rtol=1e-6, atol=1e-6), got, want
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
