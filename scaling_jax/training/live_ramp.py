"""The live batch ramp: the batch size follows the noise scale. Decides the next stage, and measures each metric.

The metric "simple", tr(Σ)/|G|², comes from every training step. Other metrics are measured at each look, on extra
sequences.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from scaling_jax.io import UserError
from scaling_jax.noise_scale import Moments, adam_norms, curvature, estimate, geometries, unbiased, value_and_grad
from scaling_jax.tasks import Model, Trainable, trainable
from scaling_jax.training.metrics import MetricsLine, course
from scaling_jax.training.program import TrainState
from scaling_jax.training.stages import LiveRamp, Metric, Stage, stage_at

PARTS = 8  # gradients that a measurement compares
Measured = geometries.NormBounds | Moments

_BOUNDS_IN_A_NORM = ("l1", "spectral")  # measured as `NormBounds`; the others are measured as `Moments`
_FEWEST_MEASURED = 3
_DOUBT = 0.02  # 1 − confidence at the first look


def next_stage(
    batch_tokens: int,
    stages: Sequence[Stage],
    live: LiveRamp | None,
    lines: Sequence[MetricsLine],
    warmup_steps: int = 0,
) -> Stage:
    """The stage of a run's next step. It depends only on the metrics so far, so a resumed run gets the same stage.

    The lines hold the batch sizes that earlier looks decided. They stand: only the look at the last line decides.

    Args:
      batch_tokens: of the first step.
      lines: metrics so far; at a look, `live` holds what `measure` returned.
      warmup_steps: the live ramp doesn't look during the warm-up.
    """
    tokens = lines[-1].tokens if lines else 0
    if live is None:
        return stage_at(batch_tokens, stages, tokens)
    batch = lines[-1].batch_tokens if lines else batch_tokens

    def looks(line: MetricsLine) -> bool:
        return line.step % live.every_steps == 0 and line.step > warmup_steps

    if lines and looks(lines[-1]) and live.factor * batch <= live.max_batch_tokens:
        since = [line for line in lines if line.batch_tokens == batch]
        confidence = confidence_at(sum(map(looks, since)))
        if _at_least(live.metric, since, confidence) > live.threshold * live.factor * batch:
            batch *= live.factor
    return Stage(tokens, batch, math.sqrt(batch / batch_tokens))


def confidence_at(look: int) -> float:
    """Confidence of the noise scale's interval at the k-th look at one batch size; rises from 98 %.

    Many looks are many chances to be wrong. Looks between the k-th and the 2k-th share most of their steps, because
    each takes the later half. So the chance to be wrong counts by doublings of k, and 0.02/(1 + log2 k)² has a finite
    sum over them. In simulation all looks together, up to 10,000, were wrong in less than 5 % of runs.
    """
    return 1 - _DOUBT / (1 + math.log2(look)) ** 2


def measure(model: Model | Trainable, metric: Metric, state: TrainState, tokens_BxT1) -> list[float]:
    """The fields of `NormBounds` or `Moments` for one metric, so that the noise scale is in tokens.

    Args:
      metric: any metric but "simple", which training steps measure.
      tokens_BxT1: sequences, or a task's examples, B a multiple of 16. Don't pass the next training batch, which would
        bias the result.

    Raises:
      UserError: for a metric of Adam, if the optimizer has no second moments.
    """
    found = _compile(model, metric)(state.params, state.opt_state, tokens_BxT1)
    task = trainable(model)
    values, context = [float(x) for x in found], task.task.units_per_example
    if isinstance(found, geometries.NormBounds):
        noise, grad_low, grad_high = values
        return [noise * math.sqrt(context), grad_low, grad_high]
    small_sq_norm, big_sq_norm, small_batch, big_batch = values
    return [small_sq_norm, big_sq_norm, small_batch * context, big_batch * context]


def _at_least(metric: Metric, since: Sequence[MetricsLine], confidence: float) -> float:
    """Lower end of the noise scale's interval in tokens, from the lines with the present batch size."""
    if metric == "simple":
        return estimate(*_of_training_steps(since), confidence).low
    measured = [line.live for line in since if line.live is not None]
    measured = measured[len(measured) // 2 :]
    if len(measured) < _FEWEST_MEASURED:
        return 0.0
    columns = np.array(measured).T
    if metric in _BOUNDS_IN_A_NORM:
        return geometries.bounds(geometries.NormBounds(*columns))[0]
    return estimate(*unbiased(Moments(*columns)), confidence).low


def _of_training_steps(lines: Sequence[MetricsLine]) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased |G|² and tr(Σ), in tokens, of the later half of the steps: the noise scale grows as the loss falls."""
    steps = course(lines)
    later = slice(len(steps.big_sq_norm) // 2, None)
    small_big = steps.small_sq_norm[later], steps.big_sq_norm[later]
    return unbiased(Moments(*small_big, steps.small_batch_tokens[later], steps.batch_tokens[later]))


@functools.cache
def _compile(model: Model | Trainable, metric: Metric):
    task = trainable(model)
    if not task.is_plain or (metric not in ("l1", "curvature") and not task.is_built_in):
        raise UserError(
            f"live_ramp.metric = {metric!r} can't be measured for task {task.name}: use simple, or l1 or curvature if "
            "its loss takes only params and batch"
        )
    return jax.jit(_MEASURES[metric](lambda params, batch: task.loss(params, None, batch, None)[0]))


def _l1(loss: Callable) -> Callable[..., Measured]:
    in_l1 = geometries.l1(loss, num_microbatches=PARTS)
    return lambda params, opt_state, tokens_BxT1: in_l1(params, tokens_BxT1)


def _spectral(loss: Callable) -> Callable[..., Measured]:
    """The spectral metric of the matrices inside layers, which are those that Muon orthogonalises."""

    def in_layers(name: str) -> bool:
        return name.startswith("layers/")

    in_spectral = geometries.spectral(loss, num_microbatches=PARTS, stacked=in_layers, select=in_layers)
    return lambda params, opt_state, tokens_BxT1: in_spectral(params, tokens_BxT1)


def _curvature(loss: Callable) -> Callable[..., Measured]:
    """tr(HΣ)/(GᵀHG). The first half of the sequences gives the gradients, the second half the Hessian."""

    def measured(params, opt_state, tokens_BxT1):
        half = len(jax.tree.leaves(tokens_BxT1)[0]) // 2
        first = jax.tree.map(lambda x: x[:half], tokens_BxT1)
        second = jax.tree.map(lambda x: x[half:], tokens_BxT1)
        return _moments(loss, curvature(loss, params, second), params, first)

    return measured


def _adam(which: str, loss: Callable) -> Callable[..., Measured]:
    """The noise scale in the metric of Adam's second moments. Their bias correction cancels in the ratio."""

    def measured(params, opt_state, tokens_BxT1):
        nu = optax.tree_utils.tree_get(opt_state, "nu")
        like: Any = jax.tree.structure(params)
        if like != jax.tree.structure(nu):  # none, or only of some, or of layers one by one
            raise UserError(
                f"live_ramp.metric = {which!r} needs Adam's second moments of every parameter: train with adam or adamw"
            )
        norms = adam_norms(nu)
        return _moments(loss, lambda grads: norms(grads)[which], params, tokens_BxT1)

    return measured


def _moments(loss: Callable, norm: Callable[[Any], jax.Array], params, tokens_BxT1) -> Moments:
    (_, moments), _ = value_and_grad(loss, num_microbatches=PARTS, norm=norm)(params, tokens_BxT1)
    return moments


_MEASURES: dict[Metric, Callable[[Callable], Callable[..., Measured]]] = {
    "l1": _l1,
    "spectral": _spectral,
    "curvature": _curvature,
    "adam_half": functools.partial(_adam, "adam_half"),
    "adam_full": functools.partial(_adam, "adam_full"),
}
