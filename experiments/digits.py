"""What is the critical batch size of an image classifier with BatchNorm? A `Task` on scikit-learn's digits.

    scaling-jax scan experiments/digits.py

Takes 2 minutes on two CPU cores that are busy with other things too. Expect B_crit of 13 to 20 images at losses of 0.5
to 0.32, with intervals from 10 to 54 or wider, and a law whose exponent may be zero: 0.8 [-0.8, 2.4]. The notes say
why: 1,400 images are a toy, the losses are reached in fewer than 100 steps, and three seeds differ. A PyTorch trainer
of the same mathematics gave 17 to 18 images; the intervals overlap at all six losses.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import scaling_jax as sj

# So that other trainers can do the same: images / 16; the first 1,400 for training, the rest held out; rows drawn with
# replacement by NumPy's default_rng(seed); 64 → 64 → 10 with BatchNorm before ReLU in the hidden layer; plain SGD
# without momentum; cross-entropy; batches of 8 … 512 in powers of two; held-out evaluation with running statistics,
# momentum 0.99 per step; evaluations at steps ×1.07. Weights start as normal(0, 1/√inputs), biases and shifts at 0.
NUM_TRAINED = 1_400
DRAWN = 200_000  # more than any run takes
WIDTH = 64

_images, _digits = load_digits(return_X_y=True)
IMAGES, DIGITS = np.asarray(_images / 16, np.float32), np.asarray(_digits, np.int32)


class Digits(sj.Task):
    """A classifier of handwritten digits with one hidden layer and BatchNorm."""

    name = "digits-mlp"
    data_name = "scikit-learn's digits"
    unit = "images"
    whole_batch = True  # BatchNorm's statistics are those of the whole batch

    def __init__(self):
        # Drawn once; the runs of each seed take them in another order.
        rows = np.random.default_rng(0).integers(0, NUM_TRAINED, DRAWN)
        self.train = IMAGES[rows], DIGITS[rows]
        self.held_out = IMAGES[NUM_TRAINED:], DIGITS[NUM_TRAINED:]

    def init(self, key):
        hidden, out = jax.random.split(key)
        params = {
            "hidden": {"w": jax.random.normal(hidden, (64, WIDTH)) / 64**0.5},
            "norm": {"scale": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)},
            "out": {"w": jax.random.normal(out, (WIDTH, 10)) / WIDTH**0.5, "b": jnp.zeros(10)},
        }
        return params, {"mean": jnp.zeros(WIDTH), "variance": jnp.ones(WIDTH)}

    def loss(self, params, state, batch):
        images, digits = batch
        h_BxW = images @ params["hidden"]["w"]
        mean, variance = h_BxW.mean(0), h_BxW.var(0)
        now = {"mean": mean, "variance": variance}
        new_state = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, state, now)
        return cross_entropy(params, h_BxW, mean, variance, digits), new_state

    def metric(self, params, state, batch):
        images, digits = batch
        h_BxW = images @ params["hidden"]["w"]
        return cross_entropy(params, h_BxW, state["mean"], state["variance"], digits)


def cross_entropy(params, h_BxW, mean, variance, digits):
    normalised_BxW = (h_BxW - mean[None]) * jax.lax.rsqrt(variance + 1e-5)[None]
    hidden_BxW = jax.nn.relu(normalised_BxW * params["norm"]["scale"][None] + params["norm"]["shift"][None])
    log_probabilities = jax.nn.log_softmax(hidden_BxW @ params["out"]["w"] + params["out"]["b"][None])
    return -jnp.take_along_axis(log_probabilities, digits[:, None], axis=1).mean()


EXPERIMENT = sj.Experiment(
    name="digits",
    subjects=(
        sj.Subject(
            Digits(), sj.log_spaced(0.5, 0.32, 6), sj.LearningRates(peak=1.6, reference_batch_tokens=64, places=1)
        ),
    ),
    batch_tokens=sj.powers_of_two(8, 512),  # images
    max_tokens=150_000,
    seeds=(0, 1, 2),
    optimizer=sj.OptimizerConfig("sgd"),
)
