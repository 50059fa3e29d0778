"""What is an example, if the batch has eight copies of each? A noisy quadratic on which the answer is a formula.

    python experiments/dependent_examples.py

Loss ½|w − x|², averaged over x ~ N(0, I): the gradient is G = w, its covariance Σ = I. A batch has 64 examples: eight
documents, eight copies of each. A step has the noise of eight independent examples, so the noise scale of these data is
8·tr(Σ)/|G|² examples, or tr(Σ)/|G|² documents. What comes out depends on the small batches in which the copies lie:

- each small batch has all copies of its documents: right, in examples;
- the document is the example, [documents, copies, …]: right, in documents;
- copies lie anywhere, or a small batch is one example: tr(Σ) is 8 times too small, and noise enters |G|²;
- every small batch has the same documents: all small batches agree, so there seems to be no noise at all.

Prints for each order of the data and each split the mean over 20,000 draws, the formula, and how many standard errors
lie between them. Takes 30 seconds on two CPU cores. Expect every mean within 3 standard errors of its formula.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.noise_scale import unbiased, value_and_grad

BATCH, COPIES, DRAWS = 64, 8, 20_000
DOCUMENTS = BATCH // COPIES
DIM = 32
PARAMS = jnp.full(DIM, 0.5)
GRAD_SQ_NORM, TRACE_COV = DIM * 0.25, float(DIM)
TRUTH = COPIES * TRACE_COV / GRAD_SQ_NORM  # examples


class Case(NamedTuple):
    what: str
    order: Callable[[Any, jax.Array], jax.Array]  # (key, documents) -> examples
    options: dict[str, Any]  # of value_and_grad
    grad_sq_norm: float  # the formulas
    trace_cov: float


class Row(NamedTuple):
    case: Case
    grad_sq_norm: np.ndarray  # [DRAWS]
    trace_cov: np.ndarray


def loss(params, x):
    return 0.5 * jnp.mean(jnp.sum((params.reshape((1,) * (x.ndim - 1) + (DIM,)) - x) ** 2, axis=-1))


def side_by_side(key, documents):
    """0 0 0 … 1 1 1 …"""
    return jnp.repeat(documents, COPIES, axis=0)


def in_turns(key, documents):
    """0 1 2 … 0 1 2 …"""
    return jnp.tile(documents, (COPIES, 1))


def together(key, documents):
    """[0 0 0 …], [1 1 1 …], …: the document is the example."""
    return jnp.repeat(documents[:, None], COPIES, axis=1)


def shuffled(key, documents):
    return jax.random.permutation(key, side_by_side(key, documents))


def cases() -> list[Case]:
    microbatches, devices = {"num_microbatches": 4}, {"axis_name": "device"}
    right = GRAD_SQ_NORM, COPIES * TRACE_COV
    # The variance of the examples of one batch, over (B − 1), in expectation.
    within = TRACE_COV * (BATCH - COPIES) / (BATCH - 1)
    anywhere = GRAD_SQ_NORM + (COPIES - 1) / (BATCH - 1) * TRACE_COV, within
    nothing = GRAD_SQ_NORM + TRACE_COV / DOCUMENTS, 0.0
    return [
        Case("copies in turns, 4 microbatches", in_turns, microbatches, *right),
        Case("copies side by side, 4 devices", side_by_side, devices, *right),
        Case("documents as examples, 4 microbatches", together, microbatches, GRAD_SQ_NORM, TRACE_COV),
        Case("shuffled, 4 microbatches", shuffled, microbatches, *anywhere),
        Case("shuffled, 4 devices", shuffled, devices, *anywhere),
        Case("single examples, 64 microbatches", shuffled, {"num_microbatches": BATCH}, *anywhere),
        Case("copies side by side, 4 microbatches", side_by_side, microbatches, *nothing),
        Case("copies in turns, 4 devices", in_turns, devices, *nothing),
    ]


def measure() -> Iterator[Row]:
    """Every case with its draws."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    for case in cases():
        fn = value_and_grad(loss, **case.options)

        def moments(key, case=case, fn=fn):
            x = case.order(jax.random.fold_in(key, 1), jax.random.normal(key, (DOCUMENTS, DIM)))
            if "axis_name" not in case.options:
                return fn(PARAMS, x)[0][1]
            on_devices = jax.vmap(fn, (None, 0), axis_name="device")(PARAMS, x.reshape(4, -1, *x.shape[1:]))
            return jax.tree.map(lambda x: x[0], on_devices[0][1])

        yield Row(case, *map(np.asarray, unbiased(jax.jit(lambda keys, of=moments: jax.lax.map(of, keys))(keys))))


def standard_errors(draws, truth) -> float:
    """Between the mean of the draws and the truth; exact agreement, to rounding, is 0."""
    draws = np.asarray(draws, np.float64)
    return (draws.mean() - truth) / (draws.std() / np.sqrt(len(draws)) + 1e-5 * GRAD_SQ_NORM)


def main() -> None:
    print(f"the noise scale of these data is {TRUTH:.3g} examples = {TRUTH / COPIES:.3g} documents")
    print("|G|² and tr(Σ): mean, formula, standard errors between them\n")
    for row in measure():
        g2, tr = row.grad_sq_norm.mean(), row.trace_cov.mean()
        print(
            f"{row.case.what:37} |G|² {g2:7.3f} {row.case.grad_sq_norm:7.3f} "
            f"{standard_errors(row.grad_sq_norm, row.case.grad_sq_norm):+5.1f}   tr(Σ) {tr:8.2f} "
            f"{row.case.trace_cov:8.2f} {standard_errors(row.trace_cov, row.case.trace_cov):+5.1f}   "
            f"noise scale {tr / g2:6.2f}"
        )


if __name__ == "__main__":
    main()
