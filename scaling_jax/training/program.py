"""The compiled training program: one call takes many optimizer steps, and measures the noise scale at each step."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_jax.io import UserError
from scaling_jax.noise_scale import TrackerState, tracker, value_and_grad
from scaling_jax.parallel import AXIS, Backend, Sharding, data_mesh, replicate, spmd
from scaling_jax.parallel.devices import (
    device_by_device,
    devices_of_run,
    fsdp_shardings,
    over_mesh,
    rows_at,
    rows_of_devices,
)
from scaling_jax.tasks import Model, Trainable, evaluator, fsdp_evaluator, rate_factor, shared_evaluator, trainable
from scaling_jax.training.gradients import gradients_of
from scaling_jax.training.optimizers import OptimizerConfig, counts_layers, make_optimizer
from scaling_jax.training.run import Run, split_batch

_KEY = 0x5EED  # apart from the keys with which models are initialised
_TRACKER = tracker(half_life=20)  # steps; for display only, as the metrics keep the raw series


class Average(NamedTuple):
    """An exponential average of the parameters over steps: `weighted_sum / weight`."""

    weighted_sum: Any
    weight: jax.Array


class TrainState(NamedTuple):
    """The whole state of a run on the devices."""

    params: Any
    opt_state: Any
    step: jax.Array  # optimizer steps taken, int32
    noise: TrackerState  # moving averages of both moments
    average: Average | None  # of the parameters; None if the run evaluates the parameters themselves
    model_state: Any = None  # that the loss takes and returns, such as BatchNorm's statistics; None without one
    key: jax.Array | None = None  # the run's random bits, of which each step takes its own key; None without randomness

    @property
    def evaluated_params(self) -> Any:
        """The parameters that evaluations use."""
        average = self.average
        return self.params if average is None else jax.tree.map(lambda x: x / average.weight, average.weighted_sum)

    @property
    def evaluated(self) -> Any:
        """The variables that evaluations use: the parameters, with the model's state if there is one."""
        return self.evaluated_params if self.model_state is None else (self.evaluated_params, self.model_state)


class StepMetrics(NamedTuple):
    """Metrics of each step of a call, float32. Norms are of the gradient before clipping."""

    loss: jax.Array  # [steps], of the batch, before the step; of text in nats per token
    small_sq_norm: jax.Array  # [steps]
    big_sq_norm: jax.Array  # [steps]
    small_sq_norm_by_layer: jax.Array  # [steps, parts], of each part of the model (`Trainable.parts`)
    big_sq_norm_by_layer: jax.Array  # [steps, parts]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is fixed when a training program is compiled. Learning rate, warm-up, seed and data are its arguments."""

    model: Model | Trainable
    optimizer: OptimizerConfig
    batch_sequences: int  # examples of any task
    num_microbatches: int
    steps_per_call: int
    num_devices: int
    backend: Backend = "pmap"  # with replicated state
    average_decay: float | None = None  # per step, of the average of the parameters
    sharding: Sharding = "replicated"  # of the state; with "fsdp" all devices together compute each microbatch

    @property
    def task(self) -> Trainable:
        return trainable(self.model)

    @property
    def small_batch_sequences(self) -> int:
        parts = self.num_microbatches * (1 if self.sharding == "fsdp" else self.num_devices)
        return self.batch_sequences // parts

    def init(self, seed: int) -> TrainState:
        """The first state, on one device. It depends only on the program and the seed."""
        return _init(self.model, self.optimizer, self.average_decay is not None)(jnp.int32(seed))

    def first_state(self, seed: int) -> TrainState:
        """The first state, placed on the devices as `steps` wants it."""
        if self.sharding == "fsdp":
            mesh = data_mesh(devices_of_run(self.num_devices))
            return jax.jit(self.init, out_shardings=state_shardings(self, mesh))(seed)
        return replicate(self.init(seed), self.num_devices // jax.process_count())

    def compile(self, rows: Any, held_out: Any) -> None:
        """Compiles what `steps` and `test_loss` call in a process of its own with these rows."""
        none = np.empty((0, self.batch_sequences), np.int32)
        state, _ = self.steps(self.first_state(0), rows, none, 0.0, 1)
        self.test_loss(state, held_out)

    def steps(
        self,
        state: TrainState,
        rows: Any,
        order: np.ndarray,
        learning_rate: float | np.ndarray,
        warmup_steps: int,
        own_rows: bool = False,
    ) -> tuple[TrainState, StepMetrics]:
        """Takes one step for each batch in `order`. Donates `state`: don't use it afterwards.

        Args:
          rows: all train rows on every device, an array or a pytree [R, …]; or each device's own [num_devices, R, …].
          order: the rows of each step's batch [steps, this process's sequences], at most `steps_per_call` steps. If
            devices have their own rows, a device's part of `order` indexes these.
          own_rows: devices have their own rows.
        """
        num_steps, own_sequences = order.shape
        order_CxB = np.zeros((self.steps_per_call, own_sequences), np.int32)
        order_CxB[:num_steps] = order
        own_devices = self.num_devices // jax.process_count()
        order_DxCxB = order_CxB.reshape(self.steps_per_call, own_devices, -1).transpose(1, 0, 2)
        rates_C = np.zeros(self.steps_per_call, np.float32)
        rates_C[:num_steps] = learning_rate
        settings = np.int32(num_steps), rates_C, np.int32(warmup_steps)
        state, metrics = compiled_steps(self, own_rows)(state, rows, order_DxCxB, settings)
        return state, jax.tree.map(lambda x: np.asarray(x)[:num_steps], metrics)

    def test_loss(self, state: TrainState, held_out: Any) -> float:
        """The loss, or the task's metric, on held-out rows; of text in nats per token. See `examples.held_out`."""
        num_devices = 1 if self.backend == "vmap" else self.num_devices
        evaluate = _evaluator(self.model, num_devices, self.sharding)
        return float(evaluate(state.evaluated, held_out))


def program_for(
    run: Run, num_devices: int = 1, backend: Backend = "pmap", sharding: Sharding = "replicated"
) -> Program:
    """The program of a run. Equal programs are compiled only once.

    Raises:
      UserError: if the batch doesn't divide over the devices; if "fsdp" can't train the task.
    """
    task = run.trainable
    if run.optimizer.name == "muon" and not task.has_stacked_layers:
        raise UserError(f"muon is for matrices of stacked layers, and {task.name} has none: see Task.is_stacked")
    if sharding == "fsdp" and not task.is_plain:
        raise UserError(
            f"{task.name} can't be trained with sharding fsdp: its loss may take only params and batch, of microbatches"
        )
    microbatch_sequences = run.microbatch_tokens // run.model.context
    return Program(
        model=run.model if isinstance(run.model, Model) else task,
        optimizer=run.optimizer.at(run.batch_tokens),
        batch_sequences=run.batch_sequences,
        num_microbatches=split_batch(run.batch_sequences, microbatch_sequences, num_devices, sharding == "fsdp"),
        steps_per_call=run.steps_per_call,
        num_devices=num_devices,
        backend=backend,
        average_decay=run.average_decay,
        sharding=sharding,
    )


def check_memory(model: Model | Trainable, parts: int = 1) -> None:
    """Raises UserError if the parameters and their gradient alone need more memory than a device has.

    Args:
      parts: number of devices of an accelerator over which "fsdp" divides them; else 1.
    """
    if isinstance(model, Trainable):
        num_weights, of = model.num_weights, ""
    else:
        num_weights, of = model.total_params, f" with vocab_size = {model.vocab_size:,} and context = {model.context:,}"
    needed = 8.0 * num_weights / parts
    if jax.default_backend() == "cpu":
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        there = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if needed > there:
        raise UserError(
            f"a model of {model.name}{of} needs at least {needed / 2**30:,.0f} GiB of memory, but there are only "
            f"{there / 2**30:,.0f}: use a smaller model"
        )


def noise_scale_so_far(noise: TrackerState) -> float:
    """The noise scale in examples, from the moving averages; NaN if |G|² isn't positive."""
    grad_sq_norm, trace_cov = map(float, _TRACKER.read(jax.tree.map(np.asarray, noise)))
    return trace_cov / grad_sq_norm if grad_sq_norm > 0 else math.nan


def one_step(
    program: Program,
    axis_name: str | tuple[()] | None,
    differentiate: Callable = value_and_grad,
    loss: Callable | None = None,
):
    """One optimizer step on one device: `(state, batch [B, …], learning_rate, warmup_steps) -> (state, metrics)`.

    Gradients and the noise scale's moments are averaged over `axis_name`; with None, state and batch are whole arrays.
    `differentiate` replaces `noise_scale.value_and_grad`, and `loss` a plain task's loss, if given.
    """
    task, optimizer = program.task, make_optimizer(program.optimizer, rate_factor(program.model))
    gradients = gradients_of(task, program.num_microbatches, axis_name, differentiate, loss)

    def step(state: TrainState, batch, learning_rate, warmup_steps):
        key = None if state.key is None else jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        loss, moments, grads, model_state = gradients(state.params, state.model_state, batch, key)
        warm = jnp.minimum(1.0, (state.step + 1) / jnp.maximum(1, warmup_steps).astype(jnp.float32))
        view = task.for_optimizer
        updates, opt_state = optimizer.update(
            view(grads), state.opt_state, view(state.params), learning_rate=learning_rate * warm
        )
        updates = task.from_optimizer(updates, state.params)
        params = optax.apply_updates(state.params, updates)
        average = _averaged(state.average, params, program.average_decay)
        by_layer = [
            jnp.stack([norms[part] for part in task.parts]) for norms in (moments.small_sq_norm, moments.big_sq_norm)
        ]
        small_sq_norm, big_sq_norm = (norms.sum() for norms in by_layer)
        noise = _TRACKER.update(moments._replace(small_sq_norm=small_sq_norm, big_sq_norm=big_sq_norm), state.noise)
        metrics = StepMetrics(loss, small_sq_norm, big_sq_norm, *by_layer)
        return TrainState(params, opt_state, state.step + 1, noise, average, model_state, state.key), metrics

    return step


def many_steps(
    program: Program,
    own_rows: bool = False,
    differentiate: Callable = value_and_grad,
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """The compiled call of `Program.steps`: `(state, rows, order [num_devices, …], settings) -> (state, metrics)`.

    Args:
      own_rows: each device has its own rows.
      differentiate: see `one_step`.
      devices: of another machine to compile for, by shard_map or "fsdp"; None takes the devices of this run.
    """
    if program.sharding == "fsdp":
        mesh = data_mesh(devices or devices_of_run(program.num_devices))
        state = state_shardings(program, mesh)
        task = program.task
        losses = device_by_device(lambda params, batch: task.loss(params, None, batch, None)[0], mesh, state.params)
        differentiate = functools.partial(differentiate, batch_sharding=NamedSharding(mesh, PartitionSpec(AXIS)))
        rows_of = rows_of_devices(mesh, own_rows)
        whole = _in_a_loop(
            program,
            one_step(program, None, differentiate, lambda params, batch: jnp.mean(losses(params, batch))),
            lambda rows, order_DxCxB, i: rows_of(rows, order_DxCxB[:, i]),
        )
        return over_mesh(whole, mesh, state=state, split=(own_rows, True, False))
    return spmd(
        _in_a_loop(
            program, one_step(program, AXIS, differentiate), lambda rows, order_CxB, i: rows_at(rows, order_CxB[i])
        ),
        split=(False, own_rows, True, False),
        num_devices=program.num_devices,
        backend=program.backend,
        donate_argnums=(0,),
        devices=devices,
    )


def state_shardings(program: Program, mesh: Mesh) -> TrainState:
    """Where "fsdp" puts the state."""
    return fsdp_shardings(jax.eval_shape(program.init, 0), mesh, counts_layers)


def param_shardings(model: Model | Trainable, mesh: Mesh) -> Any:
    """Where "fsdp" puts the parameters."""
    return fsdp_shardings(jax.eval_shape(functools.partial(init_params, model), 0), mesh, counts_layers)


def init_params(model: Model | Trainable, seed) -> Any:
    """The parameters before the first step."""
    return trainable(model).init(jax.random.key(seed))[0]


def _in_a_loop(program: Program, step: Callable, batch_of: Callable):
    def steps(state: TrainState, rows, order, settings):
        num_steps, learning_rate_C, warmup_steps = settings

        def body(i, carry):
            state, series = carry
            state, metrics = step(state, batch_of(rows, order, i), learning_rate_C[i], warmup_steps)
            return state, jax.tree.map(lambda xs, x: xs.at[i].set(x), series, metrics)

        empty = no_metrics(program, program.steps_per_call)
        # The number of steps is traced, so that calls with any number of steps use one program.
        return jax.lax.fori_loop(0, num_steps, body, (state, empty))

    return steps


def no_metrics(program: Program, *shape: int) -> StepMetrics:
    """Metrics of zeros for steps of this shape."""
    a_step, by_layer = jnp.zeros(shape), jnp.zeros((*shape, len(program.task.parts)))
    return StepMetrics(a_step, a_step, a_step, by_layer, by_layer)


@functools.cache
def _init(model: Model | Trainable, optimizer: OptimizerConfig, averaged: bool):
    task = trainable(model)

    def init(seed, start):
        params, model_state = task.init(jax.random.key(seed))
        if start is not None:
            params = jax.tree.map(lambda x, given: jnp.asarray(given, x.dtype), params, start)
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), _KEY)) if task.has_key else None
        average = Average(jax.tree.map(jnp.zeros_like, params), jnp.float32(0)) if averaged else None
        opt_state = make_optimizer(optimizer, rate_factor(model)).init(task.for_optimizer(params))
        return TrainState(params, opt_state, jnp.int32(0), _TRACKER.init(), average, model_state, key)

    compiled = jax.jit(init)
    return lambda seed: compiled(seed, task.start)


def _averaged(average: Average | None, params, decay: float | None) -> Average | None:
    if average is None or decay is None:
        return None
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, Average(params, jnp.float32(1)))


@functools.cache
def _evaluator(model: Model | Trainable, num_devices: int, sharding: Sharding):
    mesh = data_mesh(devices_of_run(num_devices))
    if sharding == "fsdp":
        return fsdp_evaluator(model, mesh, param_shardings(model, mesh))
    return evaluator(model) if num_devices == 1 else shared_evaluator(model, mesh)


compiled_steps = functools.cache(many_steps)
