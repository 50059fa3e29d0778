"""What is the critical batch size of an image classifier with BatchNorm? A `Task` on scikit-learn's digits, two seeds.

    scaling-jax scan experiments/digits.py

Takes 2 to 4 minutes on two CPU cores. Expect an honest "not much is known": B_crit of 20 to 60 images, with intervals
of a factor of two to each side, and a law whose exponent may be zero. The notes say why: 1,400 images are a toy, the
losses are reached in fewer than 100 steps, and the held-out loss of 397 images is noisy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import scaling_jax as sj

# So that other trainers can do the same: images / 16; the first 1,400 for training, the rest held out; rows drawn with
# replacement by NumPy's default_rng(seed); 64 → 64 → 10 with BatchNorm before ReLU in the hidden layer; plain SGD
# without momentum; cross-entropy; batches of 8 … 512 in powers of two; held-out evaluation with running statistics,
# momentum 0.99 per step; evaluations at steps ×1.07.
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
        rows = np.random.default_rng(0).integers(0, NUM_TRAINED, DRAWN)
        self.train = IMAGES[rows], DIGITS[rows]
        self.held_out = IMAGES[NUM_TRAINED:], DIGITS[NUM_TRAINED:]

    def init(self, key):
        hidden, out = jax.random.split(key)
        params = {
            "hidden": dense(hidden, 64, WIDTH),
            "norm": {"scale": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)},
            "out": dense(out, WIDTH, 10),
        }
        return params, {"mean": jnp.zeros(WIDTH), "variance": jnp.ones(WIDTH)}

    def loss(self, params, state, batch):
        images, digits = batch
        h_BxW = images @ params["hidden"]["w"] + params["hidden"]["b"][None]
        mean, variance = h_BxW.mean(0), h_BxW.var(0)
        unbiased = {"mean": mean, "variance": variance * len(images) / (len(images) - 1)}
        new_state = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, state, unbiased)
        return cross_entropy(params, h_BxW, mean, variance, digits), new_state

    def metric(self, params, state, batch):
        images, digits = batch
        h_BxW = images @ params["hidden"]["w"] + params["hidden"]["b"][None]
        return cross_entropy(params, h_BxW, state["mean"], state["variance"], digits)


def dense(key, width_in: int, width_out: int):
    w, b = jax.random.split(key)
    most = width_in**-0.5
    return {
        "w": jax.random.uniform(w, (width_in, width_out), minval=-most, maxval=most),
        "b": jax.random.uniform(b, (width_out,), minval=-most, maxval=most),
    }


def cross_entropy(params, h_BxW, mean, variance, digits):
    normalised_BxW = (h_BxW - mean[None]) * jax.lax.rsqrt(variance + 1e-5)[None]
    hidden_BxW = jax.nn.relu(normalised_BxW * params["norm"]["scale"][None] + params["norm"]["shift"][None])
    log_probabilities = jax.nn.log_softmax(hidden_BxW @ params["out"]["w"] + params["out"]["b"][None])
    return -jnp.take_along_axis(log_probabilities, digits[:, None], axis=1).mean()


EXPERIMENT = sj.Experiment(
    name="digits",
    subjects=(sj.Subject(Digits(), sj.log_spaced(0.6, 0.28, 7), sj.LearningRates(2.0, 64, places=2, most=10)),),
    batch_tokens=sj.powers_of_two(8, 512),
    max_tokens=150_000,
    seeds=(0, 1),
    optimizer=sj.OptimizerConfig("sgd"),
)
