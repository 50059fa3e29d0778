"""The configuration of a budget scan: models × batch sizes × learning rates × horizons, each with its annealed loss.

A run with a constant learning rate serves all horizons: short decays branch off it (`annealing`). A scan of steps to a
loss is another experiment, see `experiment`.
"""

import dataclasses
from typing import Any

from scaling_jax.fitting.budget import FEWEST_BATCHES
from scaling_jax.io import UserError
from scaling_jax.scanning.annealing import AnnealingPlan
from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates, ScanBase, Subject
from scaling_jax.tasks import LlamaConfig, ModelConfig, TaskModel, renamed
from scaling_jax.training import Recipe, Run
from scaling_jax.training.schedules import DECAY_FORMS, DecayForm

FEWEST_DECAY_STEPS = 2  # a batch has only those horizons whose decay has as many steps


@dataclasses.dataclass(frozen=True)
class BudgetSubject:
    """A model, the numbers of tokens after which its runs have decayed, and the learning rates to try."""

    model: ModelConfig | LlamaConfig | TaskModel  # or a `Task`, of which the scan keeps the record
    horizons: tuple[int, ...]  # tokens, rising; whole numbers of the batches: see `log_horizons`
    learning_rates: LearningRates

    def named(self, key: str, name: str) -> Any:
        """The value that a name stands for, if `key` may be given by a name; else None."""
        return renamed(self.model, name) if key == "model" else None


@dataclasses.dataclass(frozen=True)
class BudgetScan(ScanBase, Recipe):
    """Every model at every batch size, horizon and seed, each at its best learning rate, with a decay to zero.

    `Recipe` has the settings that all runs share. Unlike a `Run`, a scan has no warm-up unless it asks for one, and it
    evaluates seldom, because it needs only the losses at the ends.
    """

    name: str
    subjects: tuple[BudgetSubject, ...]
    batch_tokens: tuple[int, ...]
    decay_share: float = 0.1  # of each horizon, at its end
    decay_form: DecayForm = "linear"
    seeds: tuple[int, ...] = (0,)
    warmup_steps: int | None = dataclasses.field(default=0, kw_only=True)
    eval_growth: float = dataclasses.field(default=2.0, kw_only=True)

    def __post_init__(self):
        self._take_tasks()
        super().__post_init__()
        self._check_cells()
        if len(self.batch_tokens) < FEWEST_BATCHES:
            raise UserError(
                f"batch_tokens = {self.batch_tokens} must have at least {FEWEST_BATCHES} batch sizes, so that the loss "
                "has a curve over them; 7 are better"
            )
        if not 0 < self.decay_share <= 1:
            raise UserError(f"decay_share = {self.decay_share} must be above 0, at most 1")
        if self.decay_form not in DECAY_FORMS:
            raise UserError(f"decay_form = {self.decay_form!r}: choose from {', '.join(DECAY_FORMS)}")
        for subject in self.subjects:
            self._check_rates(subject)
            for batch_tokens in self.batch_tokens:
                self._check_horizons(subject, batch_tokens)
        for cell in self.cells:
            self.plan(cell, 0)  # refuses an impossible batch size before anything is trained

    def _check_rates(self, subject: BudgetSubject) -> None:
        rates = subject.learning_rates
        if rates.together > 1 or rates.catch_up is not None:
            raise UserError(
                f"learning_rates of {subject.model.name} has together or catch_up, which are for runs to a target "
                "loss: leave them out, as all runs of a budget scan train to their horizons"
            )

    def _check_horizons(self, subject: BudgetSubject, batch_tokens: int) -> None:
        name, horizons = subject.model.name, subject.horizons
        if not horizons or list(horizons) != sorted(set(horizons)) or horizons[0] < 1:
            raise UserError(f"horizons of {name}, {horizons}, must be one or more numbers of tokens that rise")
        used = self.horizons_at(subject, batch_tokens)
        if not used:
            raise UserError(
                f"a decay over {self.decay_share:g} of {horizons[-1]:,} tokens, the last horizon of {name}, is less "
                f"than {FEWEST_DECAY_STEPS} steps of {batch_tokens:,} tokens: use longer horizons or smaller batches"
            )
        if uneven := [tokens for tokens in used if tokens % batch_tokens]:
            near = max(1, round(uneven[0] / batch_tokens)) * batch_tokens
            raise UserError(
                f"horizons of {name}: {uneven[0]:,} tokens aren't a whole number of batches of {batch_tokens:,} "
                f"tokens: use {near:,}, or log_horizons(…, largest_batch=…)"
            )

    def subject(self, model: str) -> BudgetSubject:
        """The subject with this model name. Raises KeyError if there is none."""
        return {subject.model.name: subject for subject in self.subjects}[model]

    def horizons_at(self, subject: BudgetSubject, batch_tokens: int) -> tuple[int, ...]:
        """The horizons of a batch size: those whose decay has two steps or more."""
        return tuple(n for n in subject.horizons if n * self.decay_share >= FEWEST_DECAY_STEPS * batch_tokens)

    def horizons(self, cell: Cell) -> tuple[int, ...]:
        return self.horizons_at(self.subject(cell.model), cell.batch_tokens)

    def rate(self, cell: Cell, rate_index: int) -> float:
        """The learning rate `rate_index` places above the rule; see `LearningRates`."""
        return self.subject(cell.model).learning_rates.rate(cell.batch_tokens, rate_index)

    def plan(self, cell: Cell, rate_index: int) -> AnnealingPlan:
        """The trunk of a cell at one learning rate, and its decays."""
        horizons = self.horizons(cell)
        run = Run(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)},
            model=self.subject(cell.model).model,
            batch_tokens=cell.batch_tokens,
            learning_rate=self.rate(cell, rate_index),
            seed=cell.seed,
            max_tokens=horizons[-1],
        )
        return AnnealingPlan(run, horizons, self.decay_share, self.decay_form)

    def to_a_loss(self) -> Experiment:
        """A scan of steps to a loss with the same models, batch sizes and lengths, for estimates of time and memory."""
        return Experiment(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)},
            name=self.name,
            subjects=tuple(Subject(s.model, (1.0,), s.learning_rates) for s in self.subjects),
            batch_tokens=self.batch_tokens,
            max_tokens=max(s.horizons[-1] for s in self.subjects),
            seeds=self.seeds[:1],
        )
