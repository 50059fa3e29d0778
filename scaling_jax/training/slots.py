"""Runs of one program side by side: states stacked in slots, vmapped, the slots spread over groups of devices."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.parallel import AXIS, spmd, spmd_of_runs
from scaling_jax.training.evaluation import evaluator
from scaling_jax.training.program import Program, StepMetrics, TrainState, no_metrics, one_step


class Slots:
    """`num_groups · per_group` states; a slot's numbers don't depend on what its neighbours hold."""

    def __init__(self, program: Program, num_groups: int, per_group: int):
        """All slots hold the state of seed 0; each group of `program.num_devices` devices shares its slots' batches."""
        self.program, self._per_group = program, per_group
        self._compiled = program, num_groups, per_group
        shape = (num_groups, per_group)
        self._states = jax.tree.map(lambda x: jnp.broadcast_to(x, shape + x.shape), program.init(0))
        self._shape = shape

    def __len__(self) -> int:
        return int(np.prod(self._shape))

    def put(self, slot: int, state: TrainState) -> None:
        self._states = _put(self._states, divmod(slot, self._per_group), state)

    def get(self, slot: int) -> TrainState:
        return _get(self._states, divmod(slot, self._per_group))

    def steps(
        self,
        rows: jax.Array,
        orders: Sequence[np.ndarray],
        learning_rates: Sequence[float],
        warmup_steps: Sequence[int],
    ) -> StepMetrics:
        """Takes as many steps in every slot, and returns each one's metrics [slots, steps, …].

        Args:
          rows: the corpus [R, T + 1] on every device.
          orders: for each slot the rows of each step's batch [steps, batch_sequences].
        """
        num_steps = len(orders[0])
        order_SxCxB = np.zeros((len(self), self.program.steps_per_call, self.program.batch_sequences), np.int32)
        order_SxCxB[:, :num_steps] = orders
        order = order_SxCxB.reshape(*self._shape, self.program.steps_per_call, self.program.num_devices, -1)
        order_GxDxSxCxB = order.transpose(0, 3, 1, 2, 4)
        settings = np.asarray(learning_rates, np.float32), np.asarray(warmup_steps, np.int32)
        share = functools.partial(jax.tree.map, lambda x: x.reshape(*self._shape, *x.shape[1:]))
        compiled = _compile_steps(*self._compiled)
        if self.program.num_devices == 1:  # see `_over_groups`
            order_GxDxSxCxB = order_GxDxSxCxB[:, 0]
        self._states, series = compiled(self._states, rows, order_GxDxSxCxB, share(settings), jnp.int32(num_steps))
        return jax.tree.map(lambda x: np.asarray(x).reshape(len(self), *x.shape[2:])[:, :num_steps], series)

    def test_losses(self, slots: Sequence[int], held_out_RxT1: np.ndarray) -> dict[int, float]:
        """Loss on held-out rows of some slots, in nats per token."""
        wanted = np.zeros(len(self), bool)
        wanted[list(slots)] = True
        losses = _compile_losses(*self._compiled)(self._states, held_out_RxT1, wanted.reshape(self._shape))
        return {slot: float(loss) for slot, loss in enumerate(np.asarray(losses).reshape(-1)) if wanted[slot]}


@functools.partial(jax.jit, donate_argnums=0)
def _put(states: TrainState, place: Any, state: TrainState) -> TrainState:
    return jax.tree.map(lambda xs, x: xs.at[place].set(x), states, state)


@jax.jit
def _get(states: TrainState, place: Any) -> TrainState:
    return jax.tree.map(lambda xs: xs[place], states)


@functools.cache
def _compile_steps(program: Program, num_groups: int, per_group: int):
    step = jax.vmap(one_step(program, AXIS if program.num_devices > 1 else None))

    def steps(states, rows_RxT1, order_SxCxB, settings, num_steps):
        learning_rate_S, warmup_steps_S = settings

        def body(i, carry):
            states, series = carry
            states, metrics = step(states, rows_RxT1[order_SxCxB[:, i]], learning_rate_S, warmup_steps_S)
            return states, jax.tree.map(lambda xs, x: xs.at[:, i].set(x), series, metrics)

        empty = no_metrics(program, per_group, program.steps_per_call)
        return jax.lax.fori_loop(0, num_steps, body, (states, empty))

    return _over_groups(steps, program, num_groups, split=(1, 0, 2, 1, 0), donate_argnums=(0,))


@functools.cache
def _compile_losses(program: Program, num_groups: int, per_group: int):
    evaluate = evaluator(program.model)

    def losses(states: TrainState, rows_RxT1, wanted_S):
        def one(loss_S, slot):
            state = jax.tree.map(lambda xs: xs[slot], states)
            loss = jax.lax.cond(wanted_S[slot], lambda: evaluate(state.evaluated_params, rows_RxT1), lambda: 0.0)
            return loss_S.at[slot].set(loss), None

        return jax.lax.scan(one, jnp.zeros(per_group), jnp.arange(per_group))[0]

    return _over_groups(losses, program, num_groups, split=(1, 0, 1))


def _over_groups(body, program: Program, num_groups: int, split: tuple[Literal[0, 1, 2], ...], donate_argnums=()):
    """`body` of a device; see `spmd_of_runs`. Groups of one device have no axis of devices, and the run's backend."""
    if program.num_devices > 1:
        return spmd_of_runs(
            body,
            split=split,
            num_runs=num_groups,
            num_devices=program.num_devices,
            donate_argnums=donate_argnums,
        )
    return spmd(
        body,
        split=[s > 0 for s in split],
        num_devices=num_groups,
        backend=program.backend,
        donate_argnums=donate_argnums,
        split_outputs=True,
    )
