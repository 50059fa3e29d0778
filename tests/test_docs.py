"""The code that the documentation shows, run as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import scaling_jax as sj
from experiments import noisy_quadratic as quadratic

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 300, 32


def loops():
    text = (ROOT / "docs" / "noise_scale.md").read_text()
    return {re.match(r"# (\w+)", block).group(1): block for block in re.findall(r"```python\n(.*?)```", text, re.S)}


class Parameters(nnx.Module):
    def __init__(self):
        self.norm = nnx.Param(quadratic.PARAMS["norm"])


@pytest.mark.parametrize("name", ["optax", "nnx", "shard_map"])
def test_the_loops_of_the_noise_scale_page_find_the_known_noise_scale(name):
    """At a learning rate of zero the parameters stay where B_simple is known."""
    keys = jax.random.split(jax.random.key(0), STEPS)
    yours = {
        "params": quadratic.PARAMS,
        "model": Parameters(),
        "optimizer": optax.sgd(0.0),
        "loss_fn": quadratic.loss,
        "loss_of": lambda model, batch: quadratic.loss({"norm": model.norm[...]}, batch),
        "batches": [quadratic.draw(key, BATCH) for key in keys],
        "mesh": jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    }
    namespace = {"sj": sj, "jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "optax": optax, "P": P} | yours
    exec(loops()[name], namespace)
    found = sj.noise_scale.estimate(namespace["grad_sq_norm"], namespace["trace_cov"], confidence=0.999)
    assert found.resolved
    assert found.low < quadratic.TRACE_COV / quadratic.GRAD_SQ_NORM < found.high
    assert found.high / found.low < 1.7


def test_every_file_that_the_readme_links_to_exists():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 4
    for link in links:
        assert (ROOT / link).exists(), link
