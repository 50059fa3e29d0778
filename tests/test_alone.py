"""The estimator and the fits by themselves: in an environment that has jax, numpy and scipy, and nothing else."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import scaling_jax

PACKAGES = ("jax", "jaxlib", "ml_dtypes", "opt_einsum", "numpy", "scipy")  # jax and what it requires, numpy, scipy

LOOP = """
import jax.numpy as jnp, numpy as np
from scaling_jax import fitting, noise_scale

value_and_grad = noise_scale.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2), num_microbatches=2)
rows = jnp.array(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
(loss, moments), grads = value_and_grad(jnp.ones(3), rows)
print(noise_scale.estimate(*map(np.atleast_1d, map(np.repeat, noise_scale.unbiased(moments), (5, 5)))).steps)
batch = np.array([128.0, 256, 512, 1024, 2048])
print(round(float(fitting.fit_tradeoff(batch, 100 * (1 + 500 / batch)).b_crit)))
"""


@pytest.fixture
def environment(tmp_path):
    """A folder of packages, linked to those installed here."""
    site = tmp_path / "site"
    site.mkdir()
    for package in PACKAGES:
        distribution = importlib.metadata.distribution(package)
        tops = {Path(file).parts[0] for file in distribution.files or () if not str(file).startswith("..")}
        for top in tops - {"__pycache__"}:
            link, there = site / top, Path(str(distribution.locate_file(top)))
            if there.exists() and not link.exists():
                link.symlink_to(there)
    (site / "scaling_jax").symlink_to(Path(scaling_jax.__file__).parent)
    return site


def _run(site, code):
    start = f"import sys; sys.path.append({str(site)!r})\n"
    command = [sys.executable, "-I", "-S", "-c", start + code]  # no site-packages
    variables = {"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


def test_the_estimator_and_the_fits_need_jax_numpy_and_scipy_alone(environment):
    done = _run(environment, LOOP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "500"]


def test_the_environment_lacks_what_training_needs(environment):
    assert "No module named" in _run(environment, "import scaling_jax.training").stderr
