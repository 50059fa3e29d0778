"""The configuration of a batch-size scan: models, batch sizes, learning rates and target losses."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast, get_args

from scaling_jax.io import UserError
from scaling_jax.io.config import check_at_most, check_positive
from scaling_jax.tasks import LlamaConfig, ModelConfig, OtherModel, Task, TaskModel, model_config, record_of, renamed
from scaling_jax.training import Deadline, Recipe, Run
from scaling_jax.training.optimizers import weight_decay_growth
from scaling_jax.training.run import take_task

MOST_CELLS = 2_000  # a hundred times the demo's
_MOST_RATES = 1_000
_LARGEST_FACTOR = 10**9
SearchName = Literal["guided", "grid"]
FEWEST_BATCHES = 3  # of a fit of the trade-off
FEWEST_STEPS = 100  # to a target with very large batches; below, warm-up, first evaluations and rounding weigh


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """A geometric grid of learning rates around lr(B) = peak/√(1 + reference_batch_tokens/B).

    This rule grows as √B for small batches and is flat for large ones (Malladi et al. 2022; Zhang et al. 2024 for
    Adam). The search starts in the middle of the grid.
    """

    peak: float
    reference_batch_tokens: int
    factor: float = 2.0
    # Grid places per factor; with more than one, the search refines the grid around the best rate. With 1, B_crit came
    # out 14 % too small on noisy quadratics. Several seeds share the grid's error: then 8 holds the truth more often.
    places: int = 4
    most: int = 8  # largest number of rates to try for one batch size
    together: int = 1  # rates to try at a time; more than one fills an accelerator that one run doesn't fill
    give_up_factor: float | None = 2.0  # give up a rate that needs this many times the best rate's steps to some loss
    # Part of the way left to a loss, in log steps, that a run may make up; one that is later is given up. See
    # `tried.too_late`. Of the guided search, for half or twice the best rate; None: 0.08 there, all of it on the grid.
    catch_up: float | None = None
    search: SearchName = "guided"  # by what batches nearer to the middle one have shown; "grid": each batch on its own
    rate_tolerance: float = 0.02  # in log steps; no rate is tried that promises less, or a run kept that is later

    def __post_init__(self):
        for field in ("peak", "reference_batch_tokens", "places", "most", "together"):
            check_positive(f"learning_rates.{field}", getattr(self, field))
        for field in ("places", "most", "together"):
            check_at_most(f"learning_rates.{field}", getattr(self, field), _MOST_RATES)
        check_positive("learning_rates.rate_tolerance", self.rate_tolerance)
        for field in ("factor", "give_up_factor"):
            value = getattr(self, field)
            if value is not None and not 1 < value <= _LARGEST_FACTOR:
                raise UserError(f"learning_rates.{field} = {value} must be above 1, at most {_LARGEST_FACTOR:,}")
        if self.search not in (names := get_args(SearchName)):
            raise UserError(f"learning_rates.search = {self.search!r}: choose from {', '.join(names)}")
        if self.catch_up is not None and not 0 <= self.catch_up < 1:
            raise UserError(f"learning_rates.catch_up = {self.catch_up} must be from 0 to 1, or None")

    def rate(self, batch_tokens: int, index: int) -> float:
        """The rate `index` grid places above the rule, to three digits."""
        rule = self.peak / math.sqrt(1 + self.reference_batch_tokens / batch_tokens)
        try:
            return float(f"{rule * self.factor ** (index / self.places):.3g}")
        except OverflowError:
            return math.inf  # `Run` refuses it

    def growth(self, batch_tokens: int) -> tuple[float, float]:
        """(batch, rate by the rule) at a batch size, as factors of those at the reference batch size."""
        times = batch_tokens / self.reference_batch_tokens
        return times, math.sqrt(2 / (1 + 1 / times))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, the losses at which to measure its critical batch size, and the learning rates to try."""

    model: ModelConfig | LlamaConfig | OtherModel | TaskModel  # or a `Task`, of which the experiment keeps the record
    target_losses: tuple[float, ...]  # test losses in nats per token, falling; of a task those of its metric
    learning_rates: LearningRates

    def named(self, key: str, name: str) -> Any:
        """The value that a name stands for, if `key` may be given by a name; else None."""
        return renamed(self.model, name) if key == "model" else None


class Cell(NamedTuple):
    """One model, batch size and seed of an experiment. The runs of a cell differ only in learning rate and length."""

    model: str
    batch_tokens: int
    seed: int

    @property
    def name(self) -> str:
        """The name for people."""
        return f"{self.model} · {self.batch_tokens:,} tokens" + (f" · seed {self.seed}" if self.seed else "")

    @property
    def file_name(self) -> str:
        """The name for files, without an extension."""
        return f"{self.model}-b{self.batch_tokens}-s{self.seed}"


class ScanBase:
    """Models × batch sizes × seeds: what every kind of scan is made of. The base of their dataclasses."""

    if TYPE_CHECKING:  # fields of the dataclasses
        name: str
        subjects: tuple[Any, ...]
        batch_tokens: tuple[int, ...]
        seeds: tuple[int, ...]
        text: str
        tokenizer: str

    def _check_cells(self) -> None:
        for field in ("batch_tokens", "seeds"):
            values = getattr(self, field)
            if len(set(values)) < len(values) or not values:
                raise UserError(f"{field} = {values} must be one or more different values")
        for batch_tokens in self.batch_tokens:
            check_positive("batch_tokens", batch_tokens)
        check_at_most(
            "the number of models × batch sizes × seeds",
            len(self.subjects) * len(self.batch_tokens) * len(self.seeds),
            MOST_CELLS,
        )
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\\0"):
            raise UserError(f"name = {self.name!r} must be a valid name of a folder")
        names = [subject.model.name for subject in self.subjects]
        if len(set(names)) < len(names) or not names:
            raise UserError(f"subjects {names} must be one or more models with different names")
        if len(units := sorted({subject.model.unit for subject in self.subjects})) > 1:
            raise UserError(f"the models count {' and '.join(units)}: scan those of one unit at a time")

    def _take_tasks(self) -> None:
        """Sets the text to the data of the tasks among the models, and puts their records in their place."""
        tasks = [subject.model for subject in self.subjects if isinstance(subject.model, Task)]
        for task in tasks:
            before = self.text, self.tokenizer
            take_task(cast(Any, self), task)
            if task is not tasks[0] and before != (self.text, self.tokenizer):
                raise UserError(f"the tasks have different data, {before[0]} and {self.text}: scan them in two folders")
        if tasks:
            subjects = (dataclasses.replace(subject, model=record_of(subject.model)) for subject in self.subjects)
            object.__setattr__(self, "subjects", tuple(subjects))

    def with_tasks_of(self, other: Self) -> Self:
        """The scan with the code of another's tasks; it may have been read from a file, which holds none."""
        known = {s.model.name: s.model for s in other.subjects if isinstance(s.model, TaskModel)}

        def of(subject: Any) -> Any:
            found = known.get(subject.model.name)
            return dataclasses.replace(subject, model=found) if found == subject.model else subject

        return dataclasses.replace(cast(Any, self), subjects=tuple(map(of, self.subjects)))

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order of subjects, batch sizes, seeds."""
        return tuple(
            Cell(subject.model.name, batch, seed)
            for subject in self.subjects
            for batch in self.batch_tokens
            for seed in self.seeds
        )

    @property
    def unit(self) -> str:
        """What batches and budgets count: tokens, unless a task or another trainer's models count something else."""
        return self.subjects[0].model.unit


@dataclasses.dataclass(frozen=True)
class Experiment(ScanBase, Recipe):
    """A scan: every model at every batch size and seed, each at its best learning rate. A run serves all target losses.

    `Recipe` has the settings that all runs share. Unlike a `Run`, a scan has no warm-up unless it asks for one. With a
    `weight_decay_rule`, `optimizer.weight_decay` is that at `reference_batch_tokens` of the learning rates; the rate is
    that of their rule, so that all rates tried at a batch size have one weight decay, and share a program.
    """

    name: str
    subjects: tuple[Subject, ...]
    batch_tokens: tuple[int, ...]
    max_tokens: int  # a run ends here if it hasn't reached the lowest target
    seeds: tuple[int, ...] = (0,)
    # Steps of a warm-up come before the trade-off and make B_crit too small.
    warmup_steps: int | None = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self):
        self._take_tasks()
        super().__post_init__()
        if len(set(self.batch_tokens)) < FEWEST_BATCHES:
            raise UserError(
                f"batch_tokens = {self.batch_tokens} must have at least {FEWEST_BATCHES} batch sizes; 7 are better"
            )
        if min(self.batch_tokens) < 1:
            raise UserError(f"batch_tokens = {self.batch_tokens} must be positive")
        self._check_cells()
        for subject in self.subjects:
            losses = subject.target_losses
            if (
                not losses
                or not all(0 < x < math.inf for x in losses)
                or list(losses) != sorted(set(losses), reverse=True)
            ):
                raise UserError(
                    f"target_losses of {subject.model.name}, {losses}, must be positive and fall from one to the next"
                )
        for cell in self.cells:
            self.run(cell, 0)  # refuses an impossible batch size before anything is trained

    def inner(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells whose searches guide that of a cell: from the next batch size up to the middle one."""
        return () if self.subject(cell.model).learning_rates.search == "grid" else self.towards_middle(cell)

    def towards_middle(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells from the next batch size up to the middle one; none for the middle one."""
        batches = sorted(self.batch_tokens)
        middle, here = len(batches) // 2, batches.index(cell.batch_tokens)
        between = batches[middle:here][::-1] if here > middle else batches[here + 1 : middle + 1]
        return tuple(cell._replace(batch_tokens=batch_tokens) for batch_tokens in between)

    def subject(self, model: str) -> Subject:
        """The subject with this model name. Raises KeyError if there is none."""
        return {subject.model.name: subject for subject in self.subjects}[model]

    def run(
        self,
        cell: Cell,
        rate_index: int,
        target_loss: float | None = None,
        max_steps: int | None = None,
        deadlines: tuple[Deadline, ...] = (),
    ) -> Run:
        """The run of a cell at one learning rate. It ends at `target_loss`; None takes the lowest target."""
        subject = self.subject(cell.model)
        recipe = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}
        decay = weight_decay_growth(self.weight_decay_rule, *subject.learning_rates.growth(cell.batch_tokens))
        if decay != 1.0:
            weight_decay = self.optimizer.weight_decay * decay
            recipe["optimizer"] = dataclasses.replace(self.optimizer, weight_decay=weight_decay)
        return Run(
            **recipe,
            model=subject.model,
            batch_tokens=cell.batch_tokens,
            learning_rate=subject.learning_rates.rate(cell.batch_tokens, rate_index),
            seed=cell.seed,
            target_loss=min(subject.target_losses) if target_loss is None else target_loss,
            max_steps=max_steps,
            max_tokens=self.max_tokens if max_steps is None else None,
            deadlines=deadlines,
        )


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """low, 2·low, … up to high."""
    return tuple(low * 2**k for k in range(int(math.log2(high / low) + 1e-9) + 1))


def log_spaced(high: float, low: float, count: int) -> tuple[float, ...]:
    """`count` losses from high to low in equal ratios, to four digits."""
    return tuple(float(f"{high * (low / high) ** (k / (count - 1)):.4g}") for k in range(count))


DEMO = Experiment(
    name="demo",
    subjects=(
        Subject(
            model_config("1x32"),
            log_spaced(2.25, 2.05, 8)[1:],
            LearningRates(8e-3, 512, places=4, most=10),
        ),
        Subject(
            model_config("2x64"),
            log_spaced(2.35, 1.9, 14)[1:],
            LearningRates(3e-3, 512, places=4, most=10),
        ),
    ),
    batch_tokens=powers_of_two(256, 16_384),
    max_tokens=12_000_000,
    seeds=(0, 1),
)

QUICK = Experiment(
    name="quick-demo",
    subjects=(
        Subject(
            model_config("1x16"),
            log_spaced(2.8, 2.5, 6),
            LearningRates(1.6e-2, 2_048, places=1, most=3, catch_up=0.15, search="grid"),
        ),
        Subject(
            model_config("1x32"),
            log_spaced(2.7, 2.4, 7),
            LearningRates(8e-3, 2_048, places=1, most=3, catch_up=0.15, search="grid"),
        ),
    ),
    batch_tokens=powers_of_two(128, 8_192),
    max_tokens=1_500_000,
)
