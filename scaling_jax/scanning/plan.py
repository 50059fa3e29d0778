"""What a scan would take before it is started: runs, tokens, FLOPs, memory."""

import math
from typing import NamedTuple

import jax
import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.scanning.experiment import Experiment, Group
from scaling_jax.training.program import Program, program_for

LEAST_RATES = 3  # a learning rate between two others


class GroupPlan(NamedTuple):
    """One group of a scan, at most: every rate that may be tried, each to the last token."""

    group: Group
    least_runs: int
    most_runs: int
    most_tokens: int
    most_flops: float
    bytes_needed: int  # on a device, while its runs are trained


def plan_group(experiment: Experiment, group: Group, corpus_bytes: int, together: int) -> GroupPlan:
    """What a group takes, without training anything.

    Args:
      corpus_bytes: of rows on a device.
      together: runs that a device holds at a time.
    """
    rates = group.subject.learning_rates
    least, most = min(LEAST_RATES, rates.most), rates.most
    program = program_for(experiment.run(group, 0))
    tokens = experiment.max_tokens + group.batch_tokens
    return GroupPlan(
        group=group,
        least_runs=least,
        most_runs=most,
        most_tokens=most * tokens,
        most_flops=most * tokens * flops_per_token(program),
        bytes_needed=corpus_bytes + together * (_state_bytes(program) + _step_bytes(program)),
    )


def refuse_what_cannot_fit(plans: list[GroupPlan], bytes_available: int) -> None:
    """Raises UserError for a group that needs more memory than there is."""
    worst = max(plans, key=lambda p: p.bytes_needed)
    if worst.bytes_needed > bytes_available:
        raise UserError(
            f"{worst.group.name} takes about {worst.bytes_needed / 2**30:.1f} GiB of memory, there are "
            f"{bytes_available / 2**30:.1f}: make the model, microbatch_tokens or learning_rates.together smaller"
        )


def flops_per_token(program: Program) -> float:
    """Of training: 6 per parameter and token, 2 of them forwards, and attention's 12·n_layer·context·d_model.

    Kaplan et al. 2020, table 1, with the unembedding, which small models can't neglect.
    """
    model = program.model
    parameters = model.num_params + model.vocab_size * model.d_model
    return 6.0 * parameters + 12.0 * model.n_layer * model.context * model.d_model


def _state_bytes(program: Program) -> int:
    state = jax.eval_shape(lambda: program.init(0))
    gradients = 2 * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    return gradients + sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))


def _step_bytes(program: Program) -> int:
    """Activations of one microbatch, kept for the backward pass; float32."""
    model, sequences = program.model, program.batch_sequences // program.num_microbatches
    per_position = model.n_layer * (16 * model.d_model + 2 * model.n_head * model.context) + 3 * model.vocab_size
    return 4 * sequences * model.context * per_position
