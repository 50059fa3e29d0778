"""Trains many small runs at once on the same devices. When a run ends, the next run takes its slot."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.data import example_order
from scaling_jax.data.examples import count
from scaling_jax.data.feeding import resident_rows
from scaling_jax.io import UserError
from scaling_jax.parallel import AXIS, Backend, spmd, spmd_of_runs
from scaling_jax.parallel.devices import rows_at
from scaling_jax.tasks import evaluator
from scaling_jax.training.attempt import Attempt, Interrupted, find_place
from scaling_jax.training.examples import Data, held_out
from scaling_jax.training.journal import Progress, next_call, rates_of_steps, span
from scaling_jax.training.program import (
    Program,
    StepMetrics,
    TrainState,
    no_metrics,
    noise_scale_so_far,
    one_step,
    program_for,
)
from scaling_jax.training.records import RunResult
from scaling_jax.training.run import Run


def train_many(
    next_run: Callable[[], Run | None],
    on_result: Callable[[Run, RunResult], None],
    workdir: str | Path,
    corpus: Data,
    *,
    num_slots: int,
    num_devices: int = 1,
    backend: Backend = "pmap",
    checkpoint_seconds: float = 60.0,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Trains runs that share a program, each as `train` would train it, until there are no more.

    A run's numbers don't depend, bit for bit, on the other runs beside it. Compared with `train`, or with another
    number of slots or devices, they differ by rounding only.

    Args:
      next_run: called when a slot is free; returns None if there is no run to start now.
      on_result: called when a run is done; afterwards `next_run` may return more runs.
      corpus: for all runs; placed on every device.
      num_slots: number of runs at a time, rounded up to a multiple of the devices; each device trains some of them.
        With more devices than slots, several devices train each run together by shard_map, as many as divide its batch.
      should_stop: called after every call of the compiled program. If True, saves all runs and raises `Interrupted`.

    Raises:
      UserError: see `train`.
      ValueError: if the runs don't share a program.
      Interrupted: see `should_stop`.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"train_many works in one process, not in {jax.process_count()}: use `train`, or an executor for a scan"
        )
    population: _Population | None = None
    rows = resident_rows(corpus, num_devices)
    stopping = False
    try:
        while True:
            while not stopping and (population is None or population.free) and (run := next_run()) is not None:
                folder, done, _ = find_place(run, workdir, corpus)
                if done is not None:
                    on_result(run, done)
                    continue
                if population is None:
                    slots = slots_for(run, num_slots, num_devices, backend)
                    population = _Population(slots, rows, held_out(run, corpus))
                program = program_for(run, population.slots.program.num_devices, backend)
                if program != population.slots.program or run.ramp or run.live_ramp:
                    raise ValueError(f"{run.run_id} doesn't share the population's program: train it with `train`")
                state = population.slots.program.init(run.seed)
                attempt = Attempt(run, folder, corpus, state, on_progress)
                if attempt.ended is not None:
                    on_result(run, attempt.finish(attempt.ended, False, attempt.state))
                    continue
                population.start(attempt, count(corpus.train))
            if population is None or not population.seats:
                if stopping:
                    raise Interrupted(str(workdir))
                return
            stopping = stopping or should_stop()
            for seat in population.advance():
                if seat.result is not None:
                    on_result(seat.attempt.run, seat.result)
                elif stopping or time.monotonic() - seat.saved_at > checkpoint_seconds:
                    population.save(seat, leave=stopping)
    finally:
        if population is not None:
            population.close()


def slots_for(run: Run, num_slots: int, num_devices: int = 1, backend: Backend = "pmap") -> "Slots":
    """Slots for runs that share this run's program; see `train_many`."""
    each = _devices_each(num_devices, num_slots, run.batch_sequences)
    num_groups = num_devices // each
    return Slots(program_for(run, each, backend), num_groups, -(-num_slots // num_groups))


class Slots:
    """The training states of `num_groups · per_group` slots. A slot's numbers don't depend on the other slots."""

    def __init__(self, program: Program, num_groups: int, per_group: int):
        """All slots start with the state of seed 0. Each group of devices trains the batches of `per_group` slots."""
        self.program, self._per_group = program, per_group
        self._compiled = program, num_groups, per_group
        shape = (num_groups, per_group)
        copies = jax.jit(functools.partial(jax.tree.map, lambda x: jnp.broadcast_to(x, shape + x.shape)))
        self._states = copies(program.init(0))
        self._shape = shape

    def __len__(self) -> int:
        return int(np.prod(self._shape))

    def put(self, slot: int, state: TrainState) -> None:
        """Sets the state of a slot."""
        self._states = _put(self._states, divmod(slot, self._per_group), state)

    def get(self, slot: int) -> TrainState:
        """The state of a slot."""
        return _get(self._states, divmod(slot, self._per_group))

    def compile(self, rows: Any, examples: Any) -> None:
        """Compiles what `steps` and `test_losses` call with these rows."""
        none = np.empty((0, self.program.batch_sequences), np.int32)
        self.steps(rows, [none] * len(self), [0.0] * len(self), [1] * len(self))
        self.test_losses([], examples)

    def steps(
        self,
        rows: Any,
        orders: Sequence[np.ndarray],
        learning_rates: Sequence[float | np.ndarray],
        warmup_steps: Sequence[int],
    ) -> StepMetrics:
        """Takes the same number of steps in every slot, and returns their metrics [slots, steps, …].

        Args:
          rows: all train rows on every device, an array or a pytree [R, …].
          orders: for each slot, the rows of each step's batch [steps, batch_sequences].
          learning_rates, warmup_steps: for each slot.
        """
        num_steps = len(orders[0])
        order_SxCxB = np.zeros((len(self), self.program.steps_per_call, self.program.batch_sequences), np.int32)
        order_SxCxB[:, :num_steps] = orders
        order = order_SxCxB.reshape(*self._shape, self.program.steps_per_call, self.program.num_devices, -1)
        order_GxDxSxCxB = order.transpose(0, 3, 1, 2, 4)
        rates_SxC = np.zeros((len(self), self.program.steps_per_call), np.float32)
        for rates_C, of_steps in zip(rates_SxC, learning_rates, strict=True):
            rates_C[:num_steps] = of_steps
        settings = rates_SxC, np.asarray(warmup_steps, np.int32)
        share = functools.partial(jax.tree.map, lambda x: x.reshape(*self._shape, *x.shape[1:]))
        compiled = _compile_steps(*self._compiled)
        if self.program.num_devices == 1:  # see `_over_groups`
            order_GxDxSxCxB = order_GxDxSxCxB[:, 0]
        self._states, series = compiled(self._states, rows, order_GxDxSxCxB, share(settings), jnp.int32(num_steps))
        return jax.tree.map(lambda x: np.asarray(x).reshape(len(self), *x.shape[2:])[:, :num_steps], series)

    def test_losses(self, slots: Sequence[int], examples: Any) -> dict[int, float]:
        """{slot: loss on the held-out examples} of some slots; of text in nats per token."""
        wanted = np.zeros(len(self), bool)
        wanted[list(slots)] = True
        losses = _compile_losses(*self._compiled)(self._states, examples, wanted.reshape(self._shape))
        return {slot: float(loss) for slot, loss in enumerate(np.asarray(losses).reshape(-1)) if wanted[slot]}


@functools.partial(jax.jit, donate_argnums=0)
def _put(states: TrainState, place: Any, state: TrainState) -> TrainState:
    return jax.tree.map(lambda xs, x: xs.at[place].set(x), states, state)


@jax.jit
def _get(states: TrainState, place: Any) -> TrainState:
    return jax.tree.map(lambda xs: xs[place], states)


@functools.cache
def _compile_steps(program: Program, num_groups: int, per_group: int):
    step = jax.vmap(one_step(program, AXIS if program.num_devices > 1 else ()))

    def steps(states, rows, order_SxCxB, settings, num_steps):
        learning_rate_SxC, warmup_steps_S = settings

        def body(i, carry):
            states, series = carry
            states, metrics = step(states, rows_at(rows, order_SxCxB[:, i]), learning_rate_SxC[:, i], warmup_steps_S)
            return states, jax.tree.map(lambda xs, x: xs.at[:, i].set(x), series, metrics)

        empty = no_metrics(program, per_group, program.steps_per_call)
        return jax.lax.fori_loop(0, num_steps, body, (states, empty))

    return _over_groups(steps, program, num_groups, split=(1, 0, 2, 1, 0), donate_argnums=(0,))


@functools.cache
def _compile_losses(program: Program, num_groups: int, per_group: int):
    evaluate = evaluator(program.model)

    def losses(states: TrainState, examples, wanted_S):
        def one(loss_S, slot):
            state = jax.tree.map(lambda xs: xs[slot], states)
            loss = jax.lax.cond(wanted_S[slot], lambda: evaluate(state.evaluated, examples), lambda: 0.0)
            return loss_S.at[slot].set(loss), None

        return jax.lax.scan(one, jnp.zeros(per_group), jnp.arange(per_group))[0]

    return _over_groups(losses, program, num_groups, split=(1, 0, 1))


def _over_groups(body, program: Program, num_groups: int, split: tuple[Literal[0, 1, 2], ...], donate_argnums=()):
    """Compiles `body`, which runs on one device, for all groups; see `spmd_of_runs`.

    A group of one device has no device axis, and uses the program's backend.
    """
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


def _devices_each(num_devices: int, num_slots: int, batch_sequences: int) -> int:
    """Number of devices that train a run together, so that every device has work."""
    shares = range(max(1, num_devices // num_slots), 0, -1)
    return next(n for n in shares if num_devices % n == 0 and batch_sequences % n == 0)


class _Seat:
    """A run in its slot, during one of its calls."""

    def __init__(self, slot: int, attempt: Attempt, num_rows: int):
        self.slot, self.attempt, self._num_rows = slot, attempt, num_rows
        self.saved_at = time.monotonic()
        self.result: RunResult | None = None
        self.next_call()

    def next_call(self) -> None:
        """Starts the run's next call: draws the rows of its steps."""
        run, here = self.attempt.run, self.attempt.journal.here
        self.call = next_call(run, here)
        examples_seen, num_steps, batch_sequences = span(here, self.call)
        order = example_order(run.seed, examples_seen, num_steps * batch_sequences, self._num_rows)
        self.order = order.reshape(num_steps, batch_sequences)
        self.rates = rates_of_steps(here, self.call)
        self.series: list[StepMetrics] = []

    def take(self, series: StepMetrics) -> None:
        """Adds the metrics of finished steps, and removes their rows and learning rates."""
        self.order, self.rates = self.order[len(series.loss) :], self.rates[len(series.loss) :]
        self.series.append(series)


class _Population:
    """The slots and the runs in them."""

    def __init__(self, slots: Slots, rows: Any, examples: Any):
        self.slots, self._rows, self._held_out = slots, rows, examples
        self.seats: dict[int, _Seat] = {}

    @property
    def free(self) -> bool:
        return len(self.seats) < len(self.slots)

    def start(self, attempt: Attempt, num_rows: int) -> None:
        slot = next(slot for slot in range(len(self.slots)) if slot not in self.seats)
        self.slots.put(slot, attempt.state)
        self.seats[slot] = _Seat(slot, attempt, num_rows)

    def advance(self) -> list[_Seat]:
        """Takes steps until the call of some run ends. Returns the seats whose call ended.

        Finished runs have a result, and are no longer in `seats`.
        """
        num_steps = min(len(seat.order) for seat in self.seats.values())
        idle = np.zeros((num_steps, self.slots.program.batch_sequences), np.int32)
        seats = [self.seats.get(slot) for slot in range(len(self.slots))]
        series = self.slots.steps(
            self._rows,
            [idle if seat is None else seat.order[:num_steps] for seat in seats],
            [0.0 if seat is None else seat.rates[:num_steps] for seat in seats],
            [1 if seat is None else seat.attempt.run.steps_of_warmup for seat in seats],
        )
        for slot, seat in self.seats.items():
            seat.take(jax.tree.map(lambda x, slot=slot: x[slot], series))
        ended = [seat for seat in self.seats.values() if not len(seat.order)]
        losses = functools.cache(lambda: self.slots.test_losses([seat.slot for seat in ended], self._held_out))
        for seat in ended:
            self._end_call(seat, losses)
        return ended

    def _end_call(self, seat: _Seat, losses: Callable[[], dict[int, float]]) -> None:
        state = functools.cache(functools.partial(self.slots.get, seat.slot))
        status = seat.attempt.journal.write(
            seat.call,
            jax.tree.map(lambda *parts: np.concatenate(parts), *seat.series),
            self.slots.program.small_batch_sequences,
            evaluate=lambda: losses()[seat.slot],
            noise_scale=lambda: noise_scale_so_far(state().noise),
        )
        if seat.call.snapshot:
            seat.attempt.keep_snapshot(state())
        if status is not None:
            seat.result = seat.attempt.finish(status, False, state())
            del self.seats[seat.slot]
        else:
            seat.next_call()

    def save(self, seat: _Seat, leave: bool) -> None:
        seat.attempt.save(self.slots.get(seat.slot))
        seat.saved_at = time.monotonic()
        if leave:
            seat.attempt.close()
            del self.seats[seat.slot]

    def close(self) -> None:
        for seat in self.seats.values():
            seat.attempt.close()
