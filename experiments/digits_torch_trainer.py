"""A PyTorch trainer that knows nothing of this package: a perceptron that reads scikit-learn's digits.

    python experiments/digits_torch_trainer.py 64 0.8 0 300 curve.jsonl

The words are the batch size, the learning rate, the seed, the number of steps, and the file for the loss curve. Takes 4
seconds on one CPU core, most of them to import PyTorch and scikit-learn. `digits_torch.py` scans it.

64 → 64 → 10 with BatchNorm before the ReLU, plain SGD, cross-entropy. 1,400 images to train on, drawn with replacement;
397 held out, whose loss is that of the running statistics.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

TRAIN_IMAGES, PIXELS, WIDTH, DIGITS = 1_400, 64, 64, 10
MOMENTUM = 0.99  # of the running statistics, per step


def evaluations(batch: int, learning_rate: float, seed: int, max_steps: int) -> Iterator[tuple[int, float]]:
    """Trains at one setting; yields (step, held-out loss) at step 10, and whenever the steps have grown by 7 %."""
    torch.set_num_threads(1)  # one run on each core; such a small model gains nothing from more
    draws = np.random.default_rng(seed)
    images, digits = load_digits(return_X_y=True)
    pixels_NxP, digits_N = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)

    def weights(fan_in: int, fan_out: int) -> torch.Tensor:
        return torch.tensor(draws.normal(0, 1 / math.sqrt(fan_in), (fan_out, fan_in)), dtype=torch.float32)

    in_WxP, out_DxW = weights(PIXELS, WIDTH), weights(WIDTH, DIGITS)
    scale_W, shift_W, bias_D = torch.ones(WIDTH), torch.zeros(WIDTH), torch.zeros(DIGITS)
    params = [param.requires_grad_() for param in (in_WxP, scale_W, shift_W, out_DxW, bias_D)]
    mean_W, variance_W = torch.zeros(WIDTH), torch.ones(WIDTH)

    def loss(rows: np.ndarray, training: bool) -> torch.Tensor:
        hidden_BxW = F.linear(pixels_NxP[rows], in_WxP)
        if training:
            # nn.BatchNorm1d would divide this variance by B - 1; Flax and Keras divide it by B.
            variance, mean = torch.var_mean(hidden_BxW.detach(), 0, correction=0)
            mean_W.lerp_(mean, 1 - MOMENTUM)
            variance_W.lerp_(variance, 1 - MOMENTUM)
        running = [None if training else x for x in (mean_W, variance_W)]
        normed_BxW = F.batch_norm(hidden_BxW, running[0], running[1], scale_W, shift_W, training)
        return F.cross_entropy(F.linear(F.relu(normed_BxW), out_DxW, bias_D), digits_N[rows])

    held_out, next_evaluation = np.arange(TRAIN_IMAGES, len(images)), 10
    for step in range(1, max_steps + 1):
        grads = torch.autograd.grad(loss(draws.integers(0, TRAIN_IMAGES, batch), True), params)
        with torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                param.sub_(grad, alpha=learning_rate)
            if step == next_evaluation:
                yield step, loss(held_out, False).item()
                next_evaluation = max(step + 1, int(1.07 * step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in {"batch": int, "learning_rate": float, "seed": int, "max_steps": int, "curve": Path}.items():
        parser.add_argument(name, type=kind)
    given = parser.parse_args()
    with given.curve.open("w") as curve:
        for step, loss in evaluations(given.batch, given.learning_rate, given.seed, given.max_steps):
            curve.write(json.dumps({"step": step, "loss": loss if math.isfinite(loss) else None}) + "\n")
            curve.flush()


if __name__ == "__main__":
    main()
