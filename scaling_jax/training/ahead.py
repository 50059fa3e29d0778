"""The program of a ramp's next stage is compiled in a thread, while the devices train the present stage.

`jit` keeps what it compiles by function and by shapes and places of arguments. So the thread asks it for the program
with shapes alone, and the first step of the next stage finds it. It is the program that this step would compile: no
result depends on the thread, and where it fails or isn't in time, the step compiles as it would without it.
"""

import atexit
import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from scaling_jax.training.integrity import state_checksum
from scaling_jax.training.journal import Position, steps_left
from scaling_jax.training.program import Program, TrainState, compiled_steps
from scaling_jax.training.run import Run
from scaling_jax.training.stages import Stage

_LOOK_SECONDS = 0.1
_threads: list[threading.Thread] = []


class Ahead:
    """Compiles one program at a time, each once. Does nothing if `on` is False, or with several processes.

    Several processes would have to compile in the same order, as they share what XLA finds out on GPUs.
    """

    def __init__(self, on: bool = True):
        self._on = on and jax.process_count() == 1
        self._program: Program | None = None
        self._thread = threading.Thread()

    def expect(self, program: Program | None, state: TrainState, rows: Any, own_rows: bool) -> None:
        """Starts to compile a program that will be needed. Takes shapes and places of `Program.steps`'s arguments.

        Call it once the run has evaluated, so that no compilation of the training thread waits behind this one.

        Args:
          program: of the next stage; None if there is none.
          state, rows, own_rows: of the call before; only the batch size may differ.
        """
        if not self._on or program is None or program == self._program:
            return
        if self._program is None:
            # Saving compiles this. On a CPU that would wait for the thread, and an interrupt with it.
            state_checksum(state)
        self._program = program
        compile_steps = _compilation(program, state, rows, own_rows)
        self._thread = threading.Thread(target=_quietly, args=(compile_steps,), daemon=True, name="compiles ahead")
        _threads[:] = [thread for thread in _threads if thread.is_alive()] + [self._thread]
        self._thread.start()

    def wait(self, program: Program, meanwhile: Callable[[], None]) -> None:
        """Returns once the program isn't being compiled, so that it isn't compiled twice.

        Args:
          meanwhile: called several times a second; what it raises ends the wait.
        """
        while program == self._program and self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)
            if self._thread.is_alive():
                meanwhile()


def program_to_come(run: Run, here: Position, programs: Callable[[Run], Program]) -> Program | None:
    """The next program that the run's ramp needs, or a live ramp may need; None if there is none.

    Args:
      here: a position in the present stage.
      programs: the program of a run at one batch size.
    """
    now, batch_tokens = programs(here.now), here.now.batch_tokens
    if run.live_ramp is not None:
        batch = run.live_ramp.factor * batch_tokens
        grown = Stage(here.tokens, batch, math.sqrt(batch / run.batch_tokens))
        return programs(run.at(grown)) if batch <= run.live_ramp.max_batch_tokens else None
    stages = [stage for stage in run.ramp if here.tokens < stage.tokens < (run.max_tokens or math.inf)]
    if not stages or math.ceil((stages[0].tokens - here.tokens) / batch_tokens) >= steps_left(run, here):
        return None
    return next((program for stage in stages if (program := programs(run.at(stage))) != now), None)


def compiling() -> bool:
    """True while a thread compiles. XLA can't be stopped: a process that ends meanwhile must use `os._exit`."""
    return any(thread.is_alive() for thread in _threads)


def _compilation(program: Program, state: TrainState, rows: Any, own_rows: bool) -> Callable[[], Any]:
    steps = compiled_steps(program, own_rows)
    each = program.batch_sequences // program.num_devices

    def like(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.aval.weak_type)

    def like_rows(x: jax.Array) -> jax.ShapeDtypeStruct:
        shape = (x.shape[0], program.steps_per_call * each, *x.shape[2:]) if own_rows else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    arguments = (
        jax.tree.map(like, state),
        jax.tree.map(like_rows, rows),
        np.zeros((program.num_devices, program.steps_per_call, each), np.int32),
        (np.int32(0), np.zeros(program.steps_per_call, np.float32), np.int32(0)),
    )
    return lambda: steps.lower(*arguments).compile()


def _quietly(compile_steps: Callable[[], Any]) -> None:
    with contextlib.suppress(Exception):  # the stage's first step meets the same error, and raises it
        compile_steps()


@atexit.register
def _wait_at_exit() -> None:
    """Python ends a thread where it returns from XLA, which aborts the process and loses its exit code."""
    for thread in _threads:
        thread.join()
