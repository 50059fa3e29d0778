import jax
import numpy as np
import pytest

from scaling_jax.parallel import data_mesh, replicate
from scaling_jax.tasks import ModelConfig, evaluator, shared_evaluator
from scaling_jax.training.program import init_params

MODEL = ModelConfig(n_layer=2, d_model=16, n_head=2, context=16)


@pytest.mark.parametrize("num_rows", [3, 16, 48, 128, 144])
def test_devices_that_share_the_held_out_rows_find_the_same_loss_bit_for_bit(num_rows):
    params = replicate(init_params(MODEL, 0), 8)
    rows = np.random.default_rng(0).integers(0, 257, (num_rows, 17)).astype(np.uint16)
    found = shared_evaluator(MODEL, data_mesh(jax.devices()))(params, rows)
    assert float(found) == float(evaluator(MODEL)(params, rows))
