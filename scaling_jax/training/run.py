"""What one training run is: every value that its results depend on."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from scaling_jax.config import config_hash
from scaling_jax.errors import UserError
from scaling_jax.models import ModelConfig
from scaling_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Deadline:
    """A run whose test loss is still above `loss` after `step` is given up."""

    loss: float
    step: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A run at constant learning rate after a linear warm-up, so that one run serves every target loss above its last.

    It ends when the test loss has been below `target_loss` at two evaluations in a row, when it misses a deadline, or
    at `max_steps` or `max_tokens`, of which exactly one is given.
    """

    model: ModelConfig
    batch_tokens: int
    learning_rate: float
    optimizer: OptimizerConfig = OptimizerConfig()
    warmup_steps: int = 10
    seed: int = 0
    text: str = "python"
    target_loss: float | None = None  # nats per token
    max_steps: int | None = None
    max_tokens: int | None = None
    deadlines: tuple[Deadline, ...] = ()
    microbatch_tokens: int = 1024  # the noise scale's small batch at most; at least two make a step
    eval_tokens: int = 16_384
    eval_growth: float = 1.07  # evaluations lie at steps in this ratio
    steps_per_call: int = 64

    def __post_init__(self):
        for field in ("batch_tokens", "learning_rate", "microbatch_tokens", "eval_tokens", "steps_per_call"):
            if not getattr(self, field) > 0:
                raise UserError(f"{field} = {getattr(self, field)!r} must be positive")
        if (self.max_steps is None) == (self.max_tokens is None):
            raise UserError("give exactly one of max_steps and max_tokens")
        if self.eval_growth <= 1:
            raise UserError(f"eval_growth = {self.eval_growth} must be above 1: it is the ratio of evaluation steps")
        context = self.model.context
        if self.batch_tokens % context or self.batch_tokens < 2 * context:
            below = max(2, self.batch_tokens // context) * context
            raise UserError(
                f"batch of {self.batch_tokens:,} tokens is not two or more whole sequences of {context}; "
                f"nearest that are: {below:,} or {below + context:,} tokens"
            )

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.model.context

    @property
    def last_step(self) -> int:
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return max(1, self.max_tokens // self.batch_tokens)

    @property
    def run_id(self) -> str:
        """Readable, and different whenever any value differs."""
        return (
            f"{self.model.name}-b{self.batch_tokens}-lr{self.learning_rate:.2e}-s{self.seed}-{config_hash(self)}"
        ).replace("e-0", "e-")


def split_batch(batch_sequences: int, microbatch_sequences: int, num_devices: int) -> int:
    """Microbatches per device for a global batch: the fewest, no larger than asked, that leave a small batch.

    Raises:
      UserError: if the batch doesn't divide, with the nearest batches that do.
    """
    if batch_sequences % num_devices:
        below = batch_sequences // num_devices * num_devices
        near = " or ".join(str(n) for n in (below, below + num_devices) if n)
        raise UserError(
            f"a batch of {batch_sequences} sequences doesn't split over {num_devices} devices; "
            f"nearest: {near} sequences"
        )
    per_device = batch_sequences // num_devices
    fewest = 2 if num_devices == 1 else 1
    for num_microbatches in range(fewest, per_device + 1):
        if per_device % num_microbatches == 0 and per_device // num_microbatches <= max(1, microbatch_sequences):
            return num_microbatches
    raise UserError(
        f"a batch of {batch_sequences} sequence on one device leaves no small batch to measure the noise scale with: "
        "use 2 sequences or more"
    )


class Call(NamedTuple):
    """One call of the compiled program: it ends after `last_step`, with an evaluation or without."""

    last_step: int
    evaluate: bool


def calls(last_step: int, eval_growth: float, steps_per_call: int) -> Iterator[Call]:
    """A run's calls: evaluations after steps 10, 11, … in the ratio `eval_growth` and after the last, no call longer
    than `steps_per_call`. They depend on nothing else, so a resumed run makes the same ones.
    """
    step, target = 0, 10.0
    while step < last_step:
        evaluation = min(last_step, max(int(target), step + 1))
        while step < evaluation:
            step = min(evaluation, step + steps_per_call)
            yield Call(step, step == evaluation)
        target *= eval_growth
