"""Compiles the training steps of an experiment for a TPU slice, without a TPU: memory, FLOPs and communication."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from scaling_jax.compile.topologies import Topology
from scaling_jax.data.feeding import RESIDENT_BYTES
from scaling_jax.noise_scale import Moments, accumulate, value_and_grad
from scaling_jax.noise_scale.norms import add_up, leaf_sq_norms
from scaling_jax.parallel import AXIS, Sharding, data_mesh
from scaling_jax.scanning.experiment import Experiment
from scaling_jax.tasks import Model, batch_loss, evaluator, fsdp_evaluator, held_out_rows
from scaling_jax.training import Run
from scaling_jax.training.program import Program, init_params, many_steps, param_shardings, program_for, state_shardings
from scaling_jax.training.stages import Stage

_SPLIT = (False, True, False)  # of the arguments of the steps after the state, only the order of rows is split
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# An operation may have two instructions, `-start` and `-done`; this doesn't match `-done`, so it counts once.
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (?P<shape>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One communication operation of a program."""

    kind: str
    num_bytes: int  # size of the result on one device


@dataclasses.dataclass(frozen=True)
class Executable:
    """A compiled program. Bytes and FLOPs are per chip."""

    memory_bytes: int | None  # None if libtpu only says that it is too much
    fits: bool
    flops: float  # XLA's count, which counts the body of a loop once; NaN if the program doesn't fit
    collectives: tuple[Collective, ...]
    argument_bytes: int = 0  # of `memory_bytes`: the training state and the rows of text; 0 if it doesn't fit
    temporary_bytes: int = 0  # of `memory_bytes`: activations, gradients and copies
    program_bytes: int = 0  # of `memory_bytes`: instructions


@dataclasses.dataclass(frozen=True)
class CompiledBatch:
    """What a run of one model and batch size needs on a slice."""

    program: Program
    slice_name: str  # the slice that divides the batch; smaller than the one asked for if need be
    nearest_batches: tuple[int, ...]  # tokens, that all chips asked for divide; empty if they divide this batch
    step: Executable
    plain_step: Executable  # without the noise scale
    evaluation: Executable  # with the training state in memory
    step_flops: float  # of all chips, by the formula `flops_per_token` of the model
    counted_flops: float  # of all chips, counted by XLA: `counted_flops_per_token`

    @property
    def fits(self) -> bool:
        return self.step.fits and self.evaluation.fits

    @property
    def batch_tokens(self) -> int:
        return self.program.batch_sequences * self.program.task.task.units_per_example


def planned_runs(plan: Experiment | Mapping[str, Run]) -> tuple[Run, ...]:
    """One run for each model and batch size in an experiment, or in runs by name, including the batches of ramps."""
    if isinstance(plan, Experiment):
        return tuple(plan.run(cell, 0) for cell in plan.cells if cell.seed == plan.seeds[0])
    runs = {(run.model, batch): run.at(Stage(0, batch)) for run in plan.values() for batch in _batches_of(run)}
    return tuple(runs[key] for key in sorted(runs, key=lambda key: (key[0].num_params, key[1])))


def compile_runs(runs: Sequence[Run], slice_: Topology, sharding: Sharding = "replicated") -> Iterator[CompiledBatch]:
    """Compiles the runs' programs, largest batch first. If the slice doesn't divide a batch, takes a smaller slice.

    Batches with the same number of sequences per chip are compiled once, for the largest slice, if the state is
    replicated. Their programs differ only in the number of chips that add up their gradients.
    """
    least = 2 if sharding == "fsdp" else 1  # sequences on a chip
    shares: dict[Any, tuple[Executable, Executable]] = {}
    for run in sorted(map(_without_choices, runs), key=lambda run: -run.batch_tokens):
        own = slice_
        while run.batch_sequences % len(own.devices) or run.batch_sequences < least * len(own.devices):
            own = own.halved()
        program = program_for(run, len(own.devices), "shard_map", sharding)
        each = len(own.devices) if sharding == "fsdp" else None
        share = (run.model, program.small_batch_sequences, program.num_microbatches, each)
        if share not in shares:
            with ThreadPoolExecutor() as pool:  # each compilation uses one core
                methods = (value_and_grad, plain_value_and_grad)
                with_noise, without = pool.map(functools.partial(compile_steps, program, own), methods)
            shares[share] = with_noise, without
        step, plain_step = shares[share]
        one_chip = _one_chip(own)
        yield CompiledBatch(
            program=program,
            slice_name=own.name,
            nearest_batches=() if own == slice_ else _nearest(run, len(slice_.devices), least),
            step=step,
            plain_step=plain_step,
            evaluation=compile_evaluation(program, run.eval_tokens, own if sharding == "fsdp" else one_chip),
            step_flops=run.transformer.flops_per_token * run.batch_tokens,
            counted_flops=counted_flops_per_token(run.transformer, one_chip) * run.batch_tokens,
        )


def compile_steps(program: Program, slice_: Topology, differentiate: Callable = value_and_grad) -> Executable:
    """Compiles the program that `Program.steps` calls, for the chips of a slice."""
    return _compile(lower_steps(program, slice_, differentiate), slice_)


def compile_evaluation(program: Program, eval_tokens: int, slice_: Topology) -> Executable:
    """Compiles the test loss. Its memory includes the training state and the rows.

    `slice_` is a single chip if the state is replicated: every chip then computes its rows alone.
    """
    state, rows, *_ = _arguments(program)
    state = _placed_state(program, state, slice_)
    alone = _evaluation_alone(program.model, program.sharding, eval_tokens, slice_)
    if alone.memory_bytes is None:
        return alone
    memory_bytes = alone.memory_bytes + _num_bytes((state, rows)) - _num_bytes(state.params)
    return dataclasses.replace(alone, memory_bytes=memory_bytes, fits=memory_bytes <= slice_.chip.memory_bytes)


def lower_steps(program: Program, slice_: Topology, differentiate: Callable = value_and_grad):
    """Lowers the training steps, with the same function as in training, for the chips of a slice."""
    state, *others = _arguments(program)
    placed = (_placed(slice_.devices, *pair) for pair in zip(_SPLIT, others, strict=True))
    steps = many_steps(program, differentiate=differentiate, devices=slice_.devices)
    return steps.lower(_placed_state(program, state, slice_), *placed)


def plain_value_and_grad(
    loss_fn: Callable,
    *,
    num_microbatches: int,
    axis_name: str | None,
    batch_sharding: Any = None,
    groups=None,
    stacked=lambda name: False,
):
    """`noise_scale.value_and_grad` without the norms: the same sums over microbatches and devices, but fake moments."""

    def wrapped(params, batch):
        split = accumulate.split(params, batch, num_microbatches, axis_name, batch_sharding)
        loss, grads = accumulate.mean(lambda part: jax.value_and_grad(loss_fn)(split.params, part), split)
        nothing = add_up(leaf_sq_norms(jax.tree.map(jnp.zeros_like, params), stacked), groups)
        return (loss, Moments(nothing, nothing, small_batch=1.0, big_batch=2.0)), grads

    return wrapped


@functools.cache
def counted_flops_per_token(model: Model, one_chip: Topology) -> float:
    """FLOPs per training token as XLA counts them, from the gradient of one sequence; compare the formula's.

    XLA counts the body of a loop once, and large models loop over layers and over logits. So this compiles models with
    one and two layers and with small vocabularies, which have no loops, and extrapolates: FLOPs are linear in both.
    Logits that the loss computes twice to save memory (tasks/layers.py) count once.
    """

    def count(n_layer: int, vocab_size: int) -> float:
        return _gradient_flops(dataclasses.replace(model, n_layer=n_layer, vocab_size=vocab_size), one_chip)

    least = count(1, 1_024)
    a_layer, a_thousand_tokens = count(2, 1_024) - least, count(1, 2_048) - least
    all_layers = least + (model.n_layer - 1) * a_layer
    return (all_layers + (model.vocab_size / 1_024 - 1) * a_thousand_tokens) / model.context


def collectives(hlo: str) -> list[Collective]:
    """The collective operations in optimized HLO (`compiled.as_text()`). Each counts once, also inside a loop."""
    found = []
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            arrays = [_array_bytes(*array) for array in _ARRAY.findall(match["shape"])]
            with_operand = match["start"] and match["kind"] != "all-reduce"  # then the shape is (operand, result, …)
            found.append(Collective(match["kind"], max(arrays) if with_operand else sum(arrays)))
    return found


def _gradient_flops(model: Model, one_chip: Topology) -> float:
    tokens_BxT1 = jax.ShapeDtypeStruct((1, model.context + 1), jnp.int32)
    arguments = _placed(one_chip.devices, False, (_abstract_params(model), tokens_BxT1))
    return _compile(jax.jit(jax.value_and_grad(batch_loss(model))).lower(*arguments), one_chip).flops


@functools.cache
def _evaluation_alone(model: Model, sharding: Sharding, eval_tokens: int, slice_: Topology) -> Executable:
    rows = held_out_rows(np.zeros((max(1, eval_tokens // model.context), model.context + 1), np.uint16), eval_tokens)
    params, mesh = _abstract_params(model), data_mesh(slice_.devices)
    if sharding == "fsdp":
        shardings = param_shardings(model, mesh)
        params, evaluate = _with_shardings(params, shardings), fsdp_evaluator(model, mesh, shardings)
    else:
        params, evaluate = _placed(slice_.devices, False, params), evaluator(model)
    return _compile(evaluate.lower(params, _placed(slice_.devices, False, rows)), slice_)


def _compile(lowered, slice_: Topology) -> Executable:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Executable(_bytes_wanted(str(error)), False, math.nan, ())
    memory = compiled.memory_analysis()
    memory_bytes = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Executable(
        memory_bytes=memory_bytes,
        fits=memory_bytes <= slice_.chip.memory_bytes,
        flops=compiled.cost_analysis()["flops"],
        collectives=tuple(collectives(compiled.as_text())),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
    )


def _without_choices(run: Run) -> Run:
    """The run with attention="xla": with "auto", the model would look at this machine, not at the slice."""
    return dataclasses.replace(run, model=dataclasses.replace(run.transformer, attention="xla"))


def _one_chip(slice_: Topology) -> Topology:
    return slice_ if len(slice_.devices) == 1 else _one_chip(slice_.halved())


def _placed(devices, split: bool, argument):
    sharding = NamedSharding(data_mesh(devices), PartitionSpec(AXIS) if split else PartitionSpec())
    return _with_shardings(argument, jax.tree.map(lambda _: sharding, argument))


def _abstract_params(model: Model):
    return jax.eval_shape(functools.partial(init_params, model), 0)


def _arguments(program: Program) -> tuple[Any, ...]:
    """Shapes of the arguments of the steps, with the largest number of rows that a chip holds at a time."""
    context = program.task.task.units_per_example
    num_rows = RESIDENT_BYTES // (2 * (context + 1))
    order_DxCxB = (program.num_devices, program.steps_per_call, program.batch_sequences // program.num_devices)
    return (
        jax.eval_shape(program.init, 0),
        jax.ShapeDtypeStruct((num_rows, context + 1), jnp.uint16),
        jax.ShapeDtypeStruct(order_DxCxB, jnp.int32),
        tuple(jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32)),
    )


def _placed_state(program: Program, state, slice_: Topology):
    if program.sharding != "fsdp":
        return _placed(slice_.devices, False, state)
    return _with_shardings(state, state_shardings(program, data_mesh(slice_.devices)))


def _with_shardings(tree, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _num_bytes(tree) -> int:
    """Bytes on one chip."""
    shards = ((x.shape if x.sharding is None else x.sharding.shard_shape(x.shape), x) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in shards)


def _batches_of(run: Run) -> tuple[int, ...]:
    batches = [run.batch_tokens]
    while run.live_ramp is not None and batches[-1] * run.live_ramp.factor <= run.live_ramp.max_batch_tokens:
        batches.append(batches[-1] * run.live_ramp.factor)
    return *batches, *(stage.batch_tokens for stage in run.ramp)


def _nearest(run: Run, num_chips: int, least: int) -> tuple[int, ...]:
    below = run.batch_sequences // num_chips * num_chips
    near = {max(n, least * num_chips) for n in (below, below + num_chips) if n}
    return tuple(n * run.model.context for n in sorted(near))


def _bytes_wanted(message: str) -> int | None:
    match = re.search(r"[Uu]sed ([\d.]+)([KMG])|\(([\d.]+)([KMG])\)", message)
    if match is None:
        return None
    number, unit = (group for group in match.groups() if group is not None)
    return round(float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit])


def _array_bytes(element: str, bits: str, dimensions: str) -> int:
    count = 1
    for size in filter(None, dimensions.split(",")):
        count *= int(size)
    return count * (1 if element == "pred" else -(-int(bits) // 8))
