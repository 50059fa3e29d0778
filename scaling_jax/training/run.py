"""The configuration of a training run: every value that its results depend on, and batch ramps.

When the batch grows by a factor k, the learning rate grows by √k (Malladi et al. 2022, arXiv 2205.10287). By default,
Adam's β become β^k, so their half-lives in tokens stay the same (Marek et al. 2025, arXiv 2507.07101), and weight decay
stays; see `Run.betas` and `Recipe.weight_decay_rule`.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

from scaling_jax.io import UserError
from scaling_jax.io.config import check_at_most, check_positive, config_hash
from scaling_jax.tasks import (
    LanguageModel,
    LlamaConfig,
    Model,
    ModelConfig,
    OtherModel,
    Task,
    TaskModel,
    Trainable,
    record_of,
    renamed,
    trainable,
)
from scaling_jax.training.factories import path_of
from scaling_jax.training.optimizers import (
    LIKE_ADAM,
    OptimizerConfig,
    WeightDecayRule,
    check_weight_decay_rule,
    weight_decay_growth,
)
from scaling_jax.training.schedules import Schedule
from scaling_jax.training.stages import LiveRamp, Stage, check_stages

Betas = Literal["half-life", "run"]
BETAS: tuple[Betas, ...] = get_args(Betas)

_MOST_BATCH_TOKENS = 2**31  # ten times the largest batches in use; a typing error shouldn't fill the memory
_MOST_STEPS = 2**31 - 1  # the training program counts steps in an int32
_MOST_STEPS_PER_CALL = 65_536  # a call holds the order and the metrics of all of its steps


@dataclasses.dataclass(frozen=True)
class Skip:
    """A jump in the order of the training text. So runs that start from one state read other text."""

    at_tokens: int  # the jump is at the first step that has processed this many tokens
    tokens: int  # length of the text that is left out

    def __post_init__(self):
        if self.at_tokens < 0 or self.tokens < 1:
            raise UserError(
                f"skip.at_tokens = {self.at_tokens} must be 0 or more, skip.tokens = {self.tokens} 1 or more"
            )


@dataclasses.dataclass(frozen=True)
class Deadline:
    """A run is given up if its test loss is still above `loss` after `step`."""

    loss: float
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that all runs of an experiment share, whatever the model, batch size and learning rate.

    A new field needs a default that stands for the behaviour before. Otherwise earlier runs aren't found any more.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    warmup_steps: int | None = 10
    warmup_tokens: int | None = None  # instead of warmup_steps
    average_half_life_tokens: float | None = None  # evaluate an average of the weights (Zhang et al. 2024)
    text: str = "python"
    tokenizer: str = "bytes"  # or gpt2, bpe:<vocabulary>
    microbatch_tokens: int = 1024  # most that a device computes at once; a step has at least two small batches
    eval_tokens: int = 16_384
    eval_growth: float = 1.07  # ratio of the steps of successive evaluations
    eval_every_tokens: int | None = None  # if given, also evaluate at the first step past each multiple of this
    steps_per_call: int = 64  # largest number of steps in one call of the compiled program
    weight_decay_rule: WeightDecayRule = "run"  # with the batch; a run's from its first, a scan's from the reference

    def __post_init__(self):
        if callable(self.optimizer):  # a function with an import path, such as optax.lion
            object.__setattr__(self, "optimizer", OptimizerConfig(path_of(self.optimizer)))
        check_weight_decay_rule(self.weight_decay_rule, self.optimizer)
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
        check_at_most("steps_per_call", self.steps_per_call, _MOST_STEPS_PER_CALL)
        if not 1 < self.eval_growth <= 100:
            raise UserError(
                f"eval_growth = {self.eval_growth} must be above 1, at most 100: it is the ratio of evaluation steps"
            )

    def named(self, key: str, name: str) -> Any:
        """The value that a name stands for, if `key` may be given by a name; else None."""
        return OptimizerConfig(name) if key == "optimizer" else None


@dataclasses.dataclass(frozen=True)
class Run(Recipe):
    """A training run: a linear warm-up, then a constant learning rate unless `schedule` says otherwise.

    With a constant learning rate, one run serves every target loss above its last loss. The batch size may grow by
    `ramp` or `live_ramp`; `batch_tokens` and `learning_rate` are those of the first step. The run ends when the test
    loss was below `target_loss` at two evaluations in a row, when it misses a deadline, or at `max_steps` or
    `max_tokens`. Give exactly one of these two.
    """

    model: ModelConfig | LlamaConfig | OtherModel | TaskModel  # given a `Task`, its record
    batch_tokens: int
    learning_rate: float
    seed: int = 0
    ramp: tuple[Stage, ...] = ()
    live_ramp: LiveRamp | None = None
    target_loss: float | None = None  # nats per token
    max_steps: int | None = None
    max_tokens: int | None = None
    deadlines: tuple[Deadline, ...] = ()
    snapshot_tokens: tuple[int, ...] = ()  # keep the state at the first step that has processed this many tokens
    betas: Betas = "half-life"  # when the batch grows by k: Adam's β become β^k ("half-life"), or stay ("run")
    skip: Skip | None = None
    schedule: Schedule | None = None  # of the learning rate; None: constant after warm-up

    def __post_init__(self):
        take_task(self, self.model)
        object.__setattr__(self, "model", record_of(self.model))
        super().__post_init__()
        for field in ("batch_tokens", "learning_rate"):
            check_positive(field, getattr(self, field))
        for field in ("max_steps", "max_tokens", "target_loss"):
            if getattr(self, field) is not None:
                check_positive(field, getattr(self, field))
        check_at_most("max_steps", self.max_steps or 0, _MOST_STEPS)
        check_at_most(
            "warmup_tokens" if self.warmup_steps is None else "warmup_steps", self.steps_of_warmup, _MOST_STEPS
        )
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed = {self.seed} must be from 0 to {2**31 - 1:,}")
        if (self.max_steps is None) == (self.max_tokens is None):
            raise UserError("give exactly one of max_steps and max_tokens")
        if self.ramp and self.live_ramp:
            raise UserError("give a ramp or a live_ramp, not both")
        if self.schedule is not None and (self.max_tokens or 0) > (horizon := self.schedule.horizon_tokens):
            raise UserError(
                f"max_tokens = {self.max_tokens:,} is beyond schedule.horizon_tokens = {horizon:,}, where the learning "
                "rate has decayed: give a later horizon, or fewer tokens"
            )
        if self.betas not in BETAS:
            raise UserError(f"betas = {self.betas!r}: choose from {', '.join(BETAS)}")
        if self.skip is not None and self.skip.tokens % self.model.context:
            raise UserError(
                f"skip.tokens = {self.skip.tokens:,} must be whole sequences of {self.model.context} tokens"
            )
        check_stages(self.batch_tokens, self.ramp)
        if isinstance(self.model, LlamaConfig) and self.model.mup_base_width and self.optimizer.name not in LIKE_ADAM:
            raise UserError(
                f"model.mup_base_width scales Adam's learning rates, not those of {self.optimizer.name}: use one of "
                f"{', '.join(LIKE_ADAM)}"
            )
        if not isinstance(self.model, OtherModel):
            for batch_tokens in (self.batch_tokens, *(stage.batch_tokens for stage in self.ramp)):
                check_whole_sequences(batch_tokens, self.model.context, unit=self.model.unit)

    @property
    def trainable(self) -> Trainable:
        """The model with its loss, if this package trains it.

        Raises:
          UserError: if another program does, or the model is a task whose code isn't here.
        """
        if isinstance(self.model, OtherModel):
            raise UserError(
                f"{self.model.name} is a model of another trainer: use a Study, or scaling-jax scan with --command"
            )
        return trainable(self.model)

    @property
    def transformer(self) -> Model:
        """The model, if it is a built-in one, else UserError."""
        if not isinstance(self.model, Model):
            _ = self.trainable
            raise UserError(f"{self.model.name} is a task of your own: this works with the built-in models only")
        return self.model

    def named(self, key: str, name: str) -> Any:
        return renamed(self.model, name) if key == "model" else super().named(key, name)

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.model.context

    @property
    def steps_of_warmup(self) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        assert self.warmup_tokens is not None
        return -(-self.warmup_tokens // self.batch_tokens)

    @property
    def average_decay(self) -> float | None:
        """Decay per step of the average of the parameters; None without an average."""
        if self.average_half_life_tokens is None:
            return None
        return 0.5 ** (self.batch_tokens / self.average_half_life_tokens)

    def steps_left(self, step: int, tokens: int, batch_tokens: int) -> int:
        """Number of steps until `max_steps` or `max_tokens` at this batch size; a run has at least one step."""
        if self.max_steps is not None:
            return self.max_steps - step
        assert self.max_tokens is not None
        return max((self.max_tokens - tokens) // batch_tokens, 1 - step)

    def text_read(self, tokens: int) -> int:
        """Where the next step reads in the order of the text, after `tokens` processed tokens; in tokens."""
        return tokens + (self.skip.tokens if self.skip is not None and tokens >= self.skip.at_tokens else 0)

    @property
    def parted_at(self) -> int:
        """Tokens up to which the run is the same without its ramp, skip and schedule; 0 if it has none of them."""
        starts = [self.ramp[0].tokens] if self.ramp else []
        if self.skip is not None:
            starts.append(self.skip.at_tokens)
        if self.schedule is not None:
            starts.append(self.schedule.decay_from)
        return min(starts, default=0)

    def at(self, stage: Stage) -> "Run":
        """The run with the batch size and learning rate of a stage, and with the β's and weight decay there."""
        growth, by = stage.batch_tokens / self.batch_tokens, stage.learning_rate_factor
        decay = weight_decay_growth(self.weight_decay_rule, growth, by)
        return dataclasses.replace(
            self,
            batch_tokens=stage.batch_tokens,
            learning_rate=self.learning_rate * by,
            optimizer=self.optimizer.at(self.batch_tokens, growth if self.betas == "half-life" else 1.0, decay),
            ramp=(),
            live_ramp=None,
        )

    @property
    def label(self) -> str:
        """The readable start of `run_id`."""
        rate = f"{self.learning_rate:.2e}".replace("e-0", "e-")
        return f"{self.model.name}-b{self.batch_tokens}-lr{rate}-s{self.seed}"

    @property
    def run_id(self) -> str:
        """The name of a new run's folder: the label and a hash of all values that differ from their defaults.

        Nothing parses it: a folder's config.json holds the run.
        """
        return f"{self.label}-{config_hash(self)}"

    @property
    def without_limits(self) -> "Run":
        """The run without the values that only decide where it ends. Runs that are equal in this share their curve."""
        return dataclasses.replace(self, target_loss=None, max_steps=1, max_tokens=None, deadlines=())


def split_batch(batch_sequences: int, microbatch_sequences: int, num_devices: int, shared: bool = False) -> int:
    """Smallest number of microbatches per device, so that none is larger than asked and a step has two or more.

    Args:
      shared: all devices together compute each microbatch, so a device's share alone doesn't make a small batch.

    Raises:
      UserError: if the batch doesn't divide. Names the nearest batches that do.
    """
    if batch_sequences % num_devices:
        below = batch_sequences // num_devices * num_devices
        near = " or ".join(str(n) for n in (below, below + num_devices) if n)
        raise UserError(
            f"a batch of {batch_sequences} sequences doesn't divide over {num_devices} devices: use {near} sequences"
        )
    per_device = batch_sequences // num_devices
    fewest = max(2 if shared or num_devices == 1 else 1, math.ceil(per_device / max(1, microbatch_sequences)))
    for num_microbatches in range(fewest, per_device + 1):
        if per_device % num_microbatches == 0:
            return num_microbatches
    raise UserError(
        f"a batch of {batch_sequences} sequences on {num_devices} devices leaves one for each, which can't be split to "
        f"measure the noise scale: use {2 * num_devices} or more"
    )


def next_evaluation(step: int, growth: float) -> int:
    """The next evaluation after `step`. Evaluations start at step 10, and their steps grow by the factor `growth`."""
    evaluation, target = 0, 10.0
    while evaluation <= step:
        evaluation = max(int(target), evaluation + 1)
        target *= growth
    return evaluation


def take_task(recipe: Recipe, model: Any) -> None:
    """Sets the text of a recipe to the data of the task that it is given, if it is given one."""
    if isinstance(model, LanguageModel):
        object.__setattr__(recipe, "text", model.text)
        object.__setattr__(recipe, "tokenizer", model.tokenizer)
    elif isinstance(model, Task):
        object.__setattr__(recipe, "text", model.data_name or f"the data of {trainable(model).name}")


def check_whole_sequences(batch_tokens: int, context: int, name: str = "batch_tokens", unit: str = "tokens") -> None:
    """Raises UserError unless a batch is two or more whole sequences. Names the nearest that are."""
    check_at_most(name, batch_tokens, _MOST_BATCH_TOKENS)
    if batch_tokens % context or batch_tokens < 2 * context:
        below = max(2, batch_tokens // context) * context
        what = f"whole sequences of {context} tokens" if unit == "tokens" else f"whole examples of {context} {unit}"
        raise UserError(
            f"{name} = {batch_tokens:,} must be two or more {what if context > 1 else unit}: use {below:,} or "
            f"{below + context:,} {unit}"
        )
