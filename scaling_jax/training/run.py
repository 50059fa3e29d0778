"""What one training run is: every value that its results depend on, batch ramps among them.

When the batch grows k-fold, the learning rate grows by √k (Malladi et al. 2022, arXiv 2205.10287) and Adam's β become
β^k, which keeps their half-lives in tokens (Marek et al. 2025, arXiv 2507.07101).
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from scaling_jax.io import UserError
from scaling_jax.io.config import config_hash, from_dict
from scaling_jax.tasks import ModelConfig
from scaling_jax.training.optimizers import OptimizerConfig

Metric = Literal["simple", "l1", "spectral", "curvature", "adam_half", "adam_full"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclasses.dataclass(frozen=True)
class Stage:
    """From `tokens` processed on, steps of `batch_tokens` at `learning_rate_factor` times the run's learning rate."""

    tokens: int
    batch_tokens: int
    learning_rate_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LiveRamp:
    """The batch doubles once the noise scale is sure to exceed `threshold` times the doubled batch.

    Sure means the lower end of the noise scale's 95 % interval over the later half of what was measured since the last
    change: noise alone triggers nothing, and no further hysteresis is needed. The batch never shrinks. `simple`, tr(Σ)
    over |G|², comes with every training step; the other metrics (`live_metrics`) are measured at each look, and three
    looks are the fewest. In ℓ1 and the spectral norm sure means the lower of the two bounds.
    """

    threshold: float
    max_batch_tokens: int
    every_steps: int = 25  # between looks at the noise scale, the first after warm-up
    metric: Metric = "simple"
    sequences: int = 128  # that a measurement takes, besides those that are trained on

    def __post_init__(self):
        if self.metric not in METRICS:
            raise UserError(f"live_ramp.metric = {self.metric!r}: choose from {', '.join(METRICS)}")
        if not self.threshold > 0 or self.every_steps < 1:
            raise UserError(
                f"a live ramp's threshold = {self.threshold} and every_steps = {self.every_steps} are positive"
            )
        if self.sequences < 16 or self.sequences % 16:
            raise UserError(f"a live ramp's sequences = {self.sequences} make two halves of eight parts: 16, 32, 48 …")


def read_stages(path: Path) -> tuple[Stage, ...]:
    """Stages from a JSON list of them, as `scaling-jax advise --write-ramp` writes it; the first from 0 tokens on.

    Raises:
      UserError: if the file isn't there, or isn't such a list.
    """
    try:
        listed = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read a ramp from {path}: {error}") from None
    if not isinstance(listed, list) or not listed or not all(isinstance(stage, dict) for stage in listed):
        raise UserError(f'{path} isn\'t a list of stages, such as [{{"tokens": 0, "batch_tokens": 128}}]')
    stages = tuple(from_dict(Stage, stage, where=f"{path}[{k}].") for k, stage in enumerate(listed))
    if stages[0].tokens != 0:
        raise UserError(f"the first stage of {path} must start at 0 tokens, not at {stages[0].tokens:,}")
    return stages


def check_stages(batch_tokens: int, stages: Sequence[Stage]) -> None:
    """Raises UserError unless stages start later and later, with larger and larger batches."""
    before = Stage(0, batch_tokens)
    for stage in stages:
        if (
            stage.tokens <= before.tokens
            or stage.batch_tokens <= before.batch_tokens
            or stage.learning_rate_factor <= 0
        ):
            raise UserError(f"a ramp's stages start later with larger batches each: {stage} can't follow {before}")
        before = stage


def stage_at(batch_tokens: int, stages: Sequence[Stage], tokens: int) -> Stage:
    """The stage in force once `tokens` were processed; the first is the run's own batch size."""
    return [s for s in (Stage(0, batch_tokens), *stages) if s.tokens <= tokens][-1]


def next_boundary(stages: Sequence[Stage], tokens: int) -> int | None:
    """Tokens at which the next stage starts; None in the last."""
    return min((s.tokens for s in stages if s.tokens > tokens), default=None)


_MOST_BATCH_TOKENS = 2**31  # ten times what anybody trains with; a slip of the keyboard shouldn't fill the memory


@dataclasses.dataclass(frozen=True)
class Deadline:
    """A run whose test loss is still above `loss` after `step` is given up."""

    loss: float
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained whatever its size, batch size and learning rate: what all runs of an experiment share.

    Whoever adds a field gives it the default that means what was before: then runs made earlier are still found.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    warmup_steps: int | None = 10
    warmup_tokens: int | None = None  # instead of warmup_steps
    average_half_life_tokens: float | None = None  # evaluate an exponential average of the weights (Zhang et al. 2024)
    text: str = "python"
    tokenizer: str = "bytes"  # or gpt2, bpe:<vocabulary>
    microbatch_tokens: int = 1024  # the noise scale's small batch at most; at least two make a step
    eval_tokens: int = 16_384
    eval_growth: float = 1.07  # evaluations lie at steps in this ratio
    eval_every_tokens: int | None = None  # and at the first step past each multiple of this, where given
    steps_per_call: int = 64

    def __post_init__(self):
        for field in ("microbatch_tokens", "eval_tokens", "steps_per_call"):
            check_positive(field, getattr(self, field))
        for field in ("average_half_life_tokens", "eval_every_tokens"):
            if getattr(self, field) is not None:
                check_positive(field, getattr(self, field))
        for field in ("warmup_steps", "warmup_tokens"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise UserError(f"{field} = {value} must be 0 or more")
        if (self.warmup_steps is None) == (self.warmup_tokens is None):
            raise UserError("give exactly one of warmup_steps and warmup_tokens, None for the other")
        if self.eval_growth <= 1:
            raise UserError(f"eval_growth = {self.eval_growth} must be above 1: it is the ratio of evaluation steps")

    @property
    def recipe(self) -> "Recipe":
        """This part alone of a run or an experiment."""
        return Recipe(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)})


@dataclasses.dataclass(frozen=True)
class Run(Recipe):
    """A run at constant learning rate after a linear warm-up, so that one run serves every target loss above its last.

    The batch size may grow, by `ramp` or `live_ramp`; `batch_tokens` and `learning_rate` are the first step's. The run
    ends when the test loss has been below `target_loss` at two evaluations in a row, when it misses a deadline, or
    at `max_steps` or `max_tokens`, of which exactly one is given.
    """

    model: ModelConfig
    batch_tokens: int
    learning_rate: float
    seed: int = 0
    ramp: tuple[Stage, ...] = ()
    live_ramp: LiveRamp | None = None
    target_loss: float | None = None  # nats per token
    max_steps: int | None = None
    max_tokens: int | None = None
    deadlines: tuple[Deadline, ...] = ()
    snapshot_tokens: tuple[int, ...] = ()  # states to keep, at the first step that has processed so many

    def __post_init__(self):
        super().__post_init__()
        for field in ("batch_tokens", "learning_rate"):
            check_positive(field, getattr(self, field))
        for field in ("max_steps", "max_tokens", "target_loss"):
            if getattr(self, field) is not None:
                check_positive(field, getattr(self, field))
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed = {self.seed} must be from 0 to {2**31 - 1:,}")
        if self.batch_tokens > _MOST_BATCH_TOKENS:
            raise UserError(
                f"batch_tokens = {self.batch_tokens:,} is more than {_MOST_BATCH_TOKENS:,}: tokens per step"
            )
        if (self.max_steps is None) == (self.max_tokens is None):
            raise UserError("give exactly one of max_steps and max_tokens")
        if self.ramp and self.live_ramp:
            raise UserError("give a ramp or a live_ramp, not both")
        check_stages(self.batch_tokens, self.ramp)
        for batch_tokens in (self.batch_tokens, *(stage.batch_tokens for stage in self.ramp)):
            _check_whole_sequences(batch_tokens, self.model.context)

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.model.context

    @property
    def steps_of_warmup(self) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        assert self.warmup_tokens is not None
        return math.ceil(self.warmup_tokens / self.batch_tokens)

    @property
    def average_decay(self) -> float | None:
        """Per step, of the average of the weights; None if there is none."""
        if self.average_half_life_tokens is None:
            return None
        return 0.5 ** (self.batch_tokens / self.average_half_life_tokens)

    def steps_left(self, step: int, tokens: int, batch_tokens: int) -> int:
        """How many steps of a batch size fit before `max_steps` or `max_tokens`; one always does."""
        if self.max_steps is not None:
            return self.max_steps - step
        assert self.max_tokens is not None
        return max((self.max_tokens - tokens) // batch_tokens, 1 - step)

    def at(self, stage: Stage) -> "Run":
        """The run as it is in a stage: its batch size, β's with their half-lives in tokens, its learning rate."""
        growth = stage.batch_tokens / self.batch_tokens
        return dataclasses.replace(
            self,
            batch_tokens=stage.batch_tokens,
            learning_rate=self.learning_rate * stage.learning_rate_factor,
            optimizer=self.optimizer.at(self.batch_tokens, growth),
            ramp=(),
            live_ramp=None,
        )

    @property
    def label(self) -> str:
        """For people: how its run_id begins."""
        rate = f"{self.learning_rate:.2e}".replace("e-0", "e-")
        return f"{self.model.name}-b{self.batch_tokens}-lr{rate}-s{self.seed}"

    @property
    def run_id(self) -> str:
        """The name of a new run's folder; different whenever a value differs, whatever the defaults are.

        Nobody reads it: what a run is stands in its config.json.
        """
        return f"{self.label}-{config_hash(self)}"

    @property
    def without_limits(self) -> "Run":
        """What makes its curve: runs that differ in where they end are the same as far as they go."""
        return dataclasses.replace(self, target_loss=None, max_steps=1, max_tokens=None, deadlines=())


def check_positive(name: str, value: float) -> None:
    """Raises UserError unless a value is positive and finite."""
    if not 0 < value < math.inf:
        raise UserError(f"{name} = {value!r} must be positive and finite")


def _check_whole_sequences(batch_tokens: int, context: int) -> None:
    if batch_tokens > _MOST_BATCH_TOKENS:
        raise UserError(f"batch of {batch_tokens:,} tokens is too large: {_MOST_BATCH_TOKENS:,} at most")
    if batch_tokens % context or batch_tokens < 2 * context:
        below = max(2, batch_tokens // context) * context
        raise UserError(
            f"batch_tokens = {batch_tokens:,} is not two or more whole sequences of {context}; "
            f"nearest that are: {below:,} or {below + context:,} tokens"
        )


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
    fewest = max(2 if num_devices == 1 else 1, math.ceil(per_device / max(1, microbatch_sequences)))
    for num_microbatches in range(fewest, per_device + 1):
        if per_device % num_microbatches == 0:
            return num_microbatches
    raise UserError(
        f"a batch of {batch_sequences} sequence on one device leaves no small batch to measure the noise scale with: "
        "use 2 sequences or more"
    )


def next_evaluation(step: int, growth: float) -> int:
    """The first of the steps 10, 11, … in the ratio `growth` that comes after `step`."""
    evaluation, target = 0, 10.0
    while evaluation <= step:
        evaluation = max(int(target), evaluation + 1)
        target *= growth
    return evaluation
