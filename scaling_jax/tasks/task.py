"""A task of your own: a model, its loss and its data, in any JAX library; and what records hold of it.

A run's config.json must be read without the task's code. So a `Run` or a `Subject` that is given a `Task` keeps its
`TaskModel`, a plain record. In the process that made it, the record knows its task.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scaling_jax.io import UserError
from scaling_jax.io.config import check_positive
from scaling_jax.tasks.other_model import check_name, check_unit

if TYPE_CHECKING:
    _Base = Any  # to a type checker, a task fits where its record does, and a loss may take what it likes
else:
    _Base = object


class Task(_Base):
    """What is trained, and on what. Subclass it; give at least `init`, `loss`, `train` and `held_out`.

    The search, early stopping, the noise scale, fits, figures and reports work as for the built-in models. Don't change
    a task once it is in use: programs are compiled for it.

    Methods:
      init(key) -> params: the parameters before the first step, a pytree of floating-point arrays; `(params, state)` if
        the loss takes a state.
      loss(params, batch) -> loss: the training loss of a batch, a mean over its examples, or `(sum, weight)` if
        examples weigh differently, by masks for instance. It may also take `state` and `key`, by these names. With
        `state`, what the model carries from step to step (running statistics of BatchNorm), it returns
        `(loss, new_state)`. `key` is a random key, another one for each step and microbatch.
      metric(params, batch): what is evaluated on the held-out data, and what target losses are of; the loss, unless you
        define it. It may take `state`. Searches fall towards targets: give an error rate, not an accuracy. A loss that
        takes `state` or `key` needs a metric, because evaluations are without randomness and leave the state as it is.

    Attributes:
      name: a name for folders and tables; by default that of the class.
      unit: what batches, budgets and tables count, in the plural: images, games, tokens.
      units_per_example: how many of it an example holds: 1 for images, the context length for tokens.
      train, held_out: the examples: arrays, pytrees of arrays with a common leading axis, or sources with `__len__` and
        `__getitem__` (Grain's protocol), of which each item is one example. Batches are pytrees like these, with the
        examples along the leading axis.
      data_name: a name of the data, for the report.
      start: parameters to start from, instead of those of `init`: a pytree, or a folder that Orbax wrote.
      whole_batch: compute the gradient of a device's batch at once, as one loss. Set it if examples of a batch share
        statistics (BatchNorm). The noise scale then comes from a second pass over microbatches, which see their own
        statistics.
      evaluation_batch: number of held-out examples that are evaluated at a time.
      num_params: number of parameters for tables and laws, without embeddings; None counts all.
      part_of: path of a parameter (`encoder/dense/kernel`) -> the part of the model for which norms are shown; None
        takes the first name of the path.
      is_stacked: path of a parameter -> True if its leading axis counts layers.
    """

    name: str = ""
    unit: str = "examples"
    units_per_example: int = 1
    train: Any = None
    held_out: Any = None
    data_name: str = ""
    start: Any = None
    whole_batch: bool = False
    evaluation_batch: int = 128
    num_params: int | None = None

    loss: Callable[..., Any]
    metric: Callable[..., Any] | None = None
    part_of: Callable[[str], str] | None = None

    def init(self, key) -> Any:
        raise NotImplementedError(f"{type(self).__name__} needs init(self, key), which returns the parameters")

    @staticmethod
    def is_stacked(path: str) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """A `Task` in records: plain values. `trainable` is its code, in a process that has it."""

    name: str
    num_params: int
    unit: str
    units_per_example: int  # no default: it tells this record from an `OtherModel`

    def __post_init__(self):
        check_name(self.name)
        check_unit(self.unit)
        check_positive("num_params", self.num_params)
        check_positive("units_per_example", self.units_per_example)

    @property
    def context(self) -> int:
        """Length of an example in the unit."""
        return self.units_per_example

    @property
    def trainable(self) -> Any:
        """The `Trainable` of the task.

        Raises:
          UserError: if the record was read from a file, and nobody gave the task's code.
        """
        found = self.__dict__.get("_trainable")
        if found is None:
            raise UserError(
                f"{self.name} is a task of your own, and its code isn't here: give the Python file that defines it "
                "(branch --experiment FILE), or the task itself"
            )
        return found

    def known_by(self, trainable: Any) -> "TaskModel":
        """The same record, with its code."""
        known = dataclasses.replace(self)
        object.__setattr__(known, "_trainable", trainable)
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
