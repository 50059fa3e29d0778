"""Plans a scan without training: the runs, tokens, FLOPs, memory and time that it needs at most, and probably."""

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.data.examples import num_bytes, take
from scaling_jax.data.feeding import is_resident
from scaling_jax.io import UserError
from scaling_jax.io.workers import available_cores
from scaling_jax.scanning.cells import can_run_together, corpus_of, finished_runs, searched
from scaling_jax.scanning.experiment import FEWEST_STEPS, Cell, Experiment
from scaling_jax.scanning.records import check_same_recipe
from scaling_jax.scanning.speed import StepTime, time_steps
from scaling_jax.tasks import Model
from scaling_jax.training import next_evaluation
from scaling_jax.training.examples import Data, check_data
from scaling_jax.training.gradients import gradients_of
from scaling_jax.training.program import Program, program_for

LEAST_RATES = 3  # the best learning rate between two others
MOST_WORKERS = 8  # memory is the limit, because each worker loads its own JAX
PROCESS_BYTES = 600 << 20  # memory of a worker before it holds a model
EFFICIENCY = 0.3  # speed of training steps against a large matrix product, where no steps can be timed
TYPICAL_RUNS = 4  # of a cell; the demo's 28 cells have 114
TYPICAL_B_CRIT = 2_000  # tokens, for small models at the losses that they reach
_FORWARD = 1 / 3  # of a step's operations
DEMO_SHARE = 0.0118  # `ScanPlan.share` of the demo: its runs took 1/26 of the tokens that they might have taken


class CellPlan(NamedTuple):
    """What one cell needs. The largest numbers are for every rate that may be tried, each up to `max_tokens`."""

    cell: Cell
    least_runs: int
    most_runs: int
    most_tokens: int
    most_flops: float
    bytes_needed: int  # on one device during training; on CPUs, of the whole process
    most_seconds: float = math.nan  # of one worker, for its steps; NaN where these weren't timed
    evaluation_seconds: float = 0.0  # of one evaluation
    compile_seconds: float = 0.0  # of its program; 0 if another cell, of another seed, compiles it


class EasyTargets(NamedTuple):
    """Target losses that a model's largest finished batch reached in fewer than `FEWEST_STEPS` steps."""

    model: str
    batch_tokens: int
    losses: tuple[float, ...]  # nats per token
    num_targets: int


class ScanPlan(NamedTuple):
    """What a scan needs at most, and what this machine has."""

    cells: tuple[CellPlan, ...]  # cells that aren't done
    cells_done: int
    workers: int  # number of processes that train cells
    bytes_available: int  # memory for one cell
    flops_per_second: float  # of this machine, in a large matrix product
    easy: tuple[EasyTargets, ...] = ()  # of models that have finished batches
    timed: tuple[str, ...] = ()  # models of which steps were timed
    share: float = DEMO_SHARE  # see `expected_share`
    share_cells: int = 0  # finished cells that `share` is of; 0: it is the demo's
    eval_growth: float = 1.07

    @property
    def most_tokens(self) -> int:
        return sum(p.most_tokens for p in self.cells)

    @property
    def most_seconds(self) -> float:
        """Time at most. Cells that weren't timed are as fast for their FLOPs as the largest model that was."""
        return self._seconds(1.0 for _ in self.cells)

    @property
    def expected_seconds(self) -> float:
        """Time if runs end as early as those that `share` is of."""
        return self._seconds(self.expected_share(p.cell.batch_tokens) for p in self.cells)

    @property
    def expected_tokens(self) -> float:
        return sum(p.most_tokens * self.expected_share(p.cell.batch_tokens) for p in self.cells)

    def expected_share(self, batch_tokens: int) -> float:
        """Part of a cell's tokens at most that it will probably take: `share` times `tokens_by_batch`."""
        return min(1.0, self.share * tokens_by_batch(batch_tokens))

    def _seconds(self, parts: Iterable[float]) -> float:
        timed = [p for p in self.cells if math.isfinite(p.most_seconds)]
        per_flop = self.workers / (self.flops_per_second * EFFICIENCY)  # all devices share the matrix product
        if timed:
            largest = max(timed, key=lambda p: p.most_flops / p.most_tokens)
            per_flop = largest.most_seconds / largest.most_flops
        seconds = [
            part * (p.most_seconds if p in timed else p.most_flops * per_flop)
            + self._evaluations(p, part) * p.evaluation_seconds
            + p.compile_seconds
            for p, part in zip(self.cells, parts, strict=True)
        ]
        return max(sum(seconds) / self.workers, max(seconds, default=0.0))

    def _evaluations(self, plan: CellPlan, part: float) -> int:
        """Number of evaluations of a cell's runs, if they take a part of its tokens at most."""
        runs = plan.most_runs if part == 1 else min(TYPICAL_RUNS, plan.most_runs)
        return runs * evaluations(part * plan.most_tokens / runs / plan.cell.batch_tokens, self.eval_growth)


def plan_scan(experiment: Experiment, workdir: Path) -> ScanPlan:
    """What `scan` would still do in a folder, on this machine. Trains nothing, but packs the text if needed.

    Raises:
      UserError: if a cell needs more memory than there is, the text isn't there or doesn't fit a model, or the folder
        holds another experiment.
    """
    check_same_recipe(workdir, experiment)
    on_cpu = jax.default_backend() == "cpu"
    workers = min(len(available_cores()), MOST_WORKERS) if on_cpu else 1
    available = _cpu_bytes() // workers if on_cpu else _accelerator_bytes()
    waiting = [cell for cell in experiment.cells if finished_runs(experiment, cell, workdir) is None]
    plans: list[CellPlan] = []
    of_kind: dict[tuple[str, int], CellPlan] = {}  # cells that differ only in their seed need the same
    for cell in waiting:
        if cell[:2] in of_kind:
            plans.append(of_kind[cell[:2]]._replace(cell=cell))
            continue
        subject = experiment.subject(cell.model)
        corpus = corpus_of(experiment, cell)
        check_data(experiment.run(cell, 0), corpus)
        seats = len(experiment.seeds) * subject.learning_rates.together
        together = 1 if on_cpu else math.ceil(seats / jax.local_device_count())
        resident = int(num_bytes(corpus.train)) if is_resident(corpus) else 0
        plans.append(plan_cell(experiment, cell, resident + PROCESS_BYTES * on_cpu, together, corpus))
        of_kind[cell[:2]] = plans[-1]
    if plans:
        refuse_what_cannot_fit(plans, available)
    step_times: dict[str, StepTime] = {}
    if on_cpu or not any(can_run_together(experiment, cell) for cell in waiting):
        step_times = time_steps(experiment, waiting, available_cores()[:workers] if on_cpu else None)
    done = [cell for cell in experiment.cells if cell not in waiting]
    return ScanPlan(
        tuple(_timed(plans, step_times, experiment.eval_tokens)),
        len(done),
        workers,
        available,
        matmul_flops_per_second(),
        easy_targets(experiment, workdir),
        tuple(step_times),
        _share(experiment, workdir, done) or DEMO_SHARE,
        len(done),
        experiment.eval_growth,
    )


def easy_targets(experiment: Experiment, workdir: Path) -> tuple[EasyTargets, ...]:
    """The targets whose S_min is surely below `FEWEST_STEPS`, by the runs that a folder has."""
    found = []
    for subject in experiment.subjects:
        cells = [cell for cell in experiment.cells if cell.model == subject.model.name]
        ended = {cell: tried for cell in cells if (tried := searched(experiment, cell, workdir))}
        largest = max((cell.batch_tokens for cell in ended), default=0)
        runs = [t for cell, tried in ended.items() if cell.batch_tokens == largest for t in tried]
        easy = [
            loss
            for k, loss in enumerate(subject.target_losses)
            if any(t.passed_early[k] or t.steps_to_target[k] < FEWEST_STEPS for t in runs)
        ]
        if easy:
            found.append(EasyTargets(subject.model.name, largest, tuple(easy), len(subject.target_losses)))
    return tuple(found)


def plan_cell(
    experiment: Experiment, cell: Cell, corpus_bytes: int, together: int, corpus: Data | None = None
) -> CellPlan:
    """The plan of one cell.

    Args:
      corpus_bytes: size of the rows that a device holds.
      together: number of runs that a device holds at a time.
      corpus: needed for a task of your own.
    """
    rates = experiment.subject(cell.model).learning_rates
    least, most = min(LEAST_RATES, rates.most), rates.most
    program = program_for(experiment.run(cell, 0))
    tokens = experiment.max_tokens + cell.batch_tokens
    if isinstance(program.model, Model):
        per_token, step_bytes = program.model.flops_per_token, _step_bytes(program, program.model)
    else:
        assert corpus is not None
        per_token, step_bytes = _counted(program, corpus)
    return CellPlan(
        cell=cell,
        least_runs=least,
        most_runs=most,
        most_tokens=most * tokens,
        most_flops=most * tokens * per_token,
        bytes_needed=corpus_bytes + together * (_state_bytes(program) + step_bytes),
    )


def _timed(plans: Iterable[CellPlan], step_times: Mapping[str, StepTime], eval_tokens: int) -> Iterator[CellPlan]:
    """The plans with their times, where steps were timed."""
    programs = set()
    for plan in plans:
        if (step := step_times.get(plan.cell.model)) is None:
            yield plan
            continue
        steps = plan.most_tokens / plan.cell.batch_tokens
        yield plan._replace(
            most_seconds=steps * step.seconds(plan.cell.batch_tokens),
            evaluation_seconds=step.per_token * eval_tokens * _FORWARD,
            compile_seconds=0.0 if plan.cell[:2] in programs else step.compiling,
        )
        programs.add(plan.cell[:2])


def evaluations(steps: float, growth: float) -> int:
    """Number of evaluations of a run."""
    count, step = 0, 0
    while (step := next_evaluation(step, growth)) <= steps:
        count += 1
    return count + 1  # at its end


def _share(experiment: Experiment, workdir: Path, done: Sequence[Cell]) -> float | None:
    """`ScanPlan.share` of the cells that are done; None without such cells."""
    taken = sum(t.result.tokens for cell in done for t in searched(experiment, cell, workdir))
    might = sum(
        experiment.subject(cell.model).learning_rates.most
        * (experiment.max_tokens + cell.batch_tokens)
        * tokens_by_batch(cell.batch_tokens)
        for cell in done
    )
    return taken / might if taken else None


def tokens_by_batch(batch_tokens: int) -> float:
    """Tokens to a loss with a batch, relative to small batches: 1 + B/B_crit (McCandlish et al. 2018)."""
    return 1 + batch_tokens / TYPICAL_B_CRIT


def refuse_what_cannot_fit(plans: list[CellPlan], bytes_available: int) -> None:
    """Raises UserError if a cell needs more memory than there is."""
    worst = max(plans, key=lambda p: p.bytes_needed)
    if worst.bytes_needed > bytes_available:
        raise UserError(
            f"{worst.cell.name} needs about {worst.bytes_needed / 2**30:.1f} GiB of memory, but there are only "
            f"{bytes_available / 2**30:.1f}: use a smaller model, microbatch_tokens or learning_rates.together"
        )


def matmul_flops_per_second(size: int = 1024, seconds: float = 0.3) -> float:
    """Speed of a large float32 matrix product on all local devices together, measured now."""
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((size, size))
    product(a).block_until_ready()
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        product(a).block_until_ready()
        count += 1
    return jax.local_device_count() * count * 2.0 * size**3 / passed


def _state_bytes(program: Program) -> int:
    state = jax.eval_shape(lambda: program.init(0))
    gradients = 2 * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    return gradients + sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))


def _counted(program: Program, corpus: Data) -> tuple[float, int]:
    """(FLOPs per unit, bytes beside the state) of a task's gradient, as XLA counts them; its scans count once."""
    state = jax.eval_shape(lambda: program.init(0))
    example = take(corpus.train, np.zeros(1, int))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((program.batch_sequences, *x.shape[1:]), x.dtype), example)
    key = jax.eval_shape(lambda: jax.random.key(0)) if program.task.has_key else None
    gradients = jax.jit(gradients_of(program.task, program.num_microbatches, None))
    compiled = gradients.lower(state.params, state.model_state, batch, key).compile()
    units = program.batch_sequences * program.task.task.units_per_example / program.num_microbatches
    flops, memory = (compiled.cost_analysis() or {}).get("flops", math.nan), compiled.memory_analysis()
    return flops / units, memory.temp_size_in_bytes if memory is not None else 0


def _step_bytes(program: Program, model: Model) -> int:
    """Size of the float32 activations of one microbatch, which the backward pass needs."""
    sequences = program.batch_sequences // program.num_microbatches
    return 4 * sequences * model.context * model.kept_per_token


def _cpu_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _accelerator_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 2**63))
