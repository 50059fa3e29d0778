"""A task in one form, whatever its loss takes and returns, so that one program trains all tasks."""

import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from scaling_jax.io import UserError
from scaling_jax.noise_scale.accumulate import path_name
from scaling_jax.noise_scale.norms import leaf_sq_norms
from scaling_jax.tasks.language_model import LanguageModel
from scaling_jax.tasks.models import Model
from scaling_jax.tasks.task import Task, TaskModel

_MOST_PARTS = 32  # of a model, for which norms are kept; with more, only that of the whole
_WHOLE = "all"


class Trainable:
    """The functions of a task, with their arguments in one order. Equal only to itself: programs are compiled for it.

    `variables` are what an evaluation needs: the parameters, or `(params, state)` if the loss takes a state.

    Raises:
      UserError: if the task lacks something, or its functions take what they aren't given.
    """

    def __init__(self, task: Task):
        self.task = task
        self.name = task.name or type(task).__name__
        if not callable(getattr(task, "loss", None)):
            raise UserError(f"task {self.name} has no loss: define loss(self, params, batch)")
        self._loss_takes = _names(self.name, "loss", task.loss, ("params", "batch", "state", "key"))
        self.has_state, self.has_key = "state" in self._loss_takes, "key" in self._loss_takes
        own = task.metric
        if own is None and (self.has_state or self.has_key):
            takes = " and ".join(name for name in ("state", "key") if name in self._loss_takes)
            raise UserError(
                f"the loss of task {self.name} takes {takes}: define metric(self, params, batch), or with state, which "
                "evaluates held-out examples without randomness and leaves the state as it is"
            )
        self._metric: Callable = task.loss if own is None else own
        self._metric_takes = _names(self.name, "metric", self._metric, ("params", "batch", "state"))
        if "state" in self._metric_takes and not self.has_state:
            raise UserError(f"the metric of task {self.name} takes a state, but its loss has none")
        self.is_stacked: Callable[[str], bool] = task.is_stacked
        self.evaluation_batch = task.evaluation_batch
        self.source: Path | None = None  # the Python file that defines the task, if other processes can run it

    def init(self, key) -> tuple[Any, Any]:
        """(params, state) before the first step; the state is None if the loss takes none."""
        found = self.task.init(key)
        if not self.has_state:
            return found, None
        if not isinstance(found, tuple) or len(found) != 2:
            raise UserError(f"the loss of task {self.name} takes a state: its init must return (params, state)")
        return found

    def loss(self, params, state, batch, key) -> tuple[Any, Any]:
        """(loss, new state) of a batch; the loss is a mean or `(sum, weight)`."""
        state = jax.tree.map(lambda x: x, state)  # NNX changes its variables in place, if they are made in this trace
        given = {"params": params, "batch": batch, "state": state, "key": key}
        found = self.task.loss(**{name: given[name] for name in self._loss_takes})
        if not self.has_state:
            return found, None
        if not isinstance(found, tuple) or len(found) != 2:
            raise UserError(f"the loss of task {self.name} takes a state: it must return (loss, new_state)")
        return found

    def evaluate(self, variables, batch) -> Any:
        """The metric of held-out examples: a mean or `(sum, weight)`."""
        params, state = variables if self.has_state else (variables, None)
        given = {"params": params, "batch": batch, "state": jax.tree.map(lambda x: x, state)}
        return self._metric(**{name: given[name] for name in self._metric_takes})

    def weighted(self, params, state, batch, key) -> bool:
        """True if the loss is `(sum, weight)`. Takes arrays or their shapes. Raises UserError for other losses."""
        if isinstance(self.task, LanguageModel):
            return False
        value, _ = jax.eval_shape(self.loss, params, state, batch, key)
        shapes = [jnp.shape(x) for x in jax.tree.leaves(value)]
        weighted = isinstance(value, (tuple, list))
        if shapes != [()] * (2 if weighted else 1):
            raise UserError(
                f"loss of task {self.name} returns {' and '.join(map(str, shapes)) or 'nothing'}: it must return a "
                "number, the mean over the batch's examples, or (sum, weight)"
            )
        return weighted

    @property
    def is_plain(self) -> bool:
        """True if the loss takes only parameters and batch, and all of a batch needn't be computed at once."""
        return not (self.has_state or self.has_key or self.task.whole_batch)

    @property
    def is_built_in(self) -> bool:
        """True for the built-in models."""
        return isinstance(self.task, LanguageModel) and isinstance(self.task.model, Model)

    @property
    def has_stacked_layers(self) -> bool:
        return bool(self.for_optimizer(self.shapes[0])["layers"])

    @functools.cached_property
    def shapes(self) -> tuple[Any, Any]:
        """Shapes of (params, state)."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        if not jax.tree.leaves(shapes[0]):
            raise UserError(f"init of task {self.name} returns no parameters")
        for path, x in jax.tree_util.tree_leaves_with_path(shapes[0]):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise UserError(
                    f"parameter {path_name(path)!r} of task {self.name} is {x.dtype}: parameters must be "
                    "floating-point arrays; put others into the state, or into the task"
                )
        for path, x in jax.tree_util.tree_leaves_with_path(shapes[1]):
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                raise UserError(
                    f"state {path_name(path)!r} of task {self.name} is a random key: let the loss take key instead"
                )
        return shapes

    @functools.cached_property
    def num_weights(self) -> int:
        """The number of all parameters."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.shapes[0]))

    @functools.cached_property
    def start(self) -> Any:
        """The task's starting parameters; None if they are those of `init`."""
        start = self.task.start
        if isinstance(start, str | Path):
            start = _read_params(Path(start), self.shapes[0], self.name)
        if start is not None:
            own, given = (jax.tree.map(jnp.shape, tree) for tree in (self.shapes[0], start))
            if own != given:
                raise UserError(f"start of task {self.name} has other parameters than init: {given}, not {own}")
        return start

    def for_optimizer(self, tree: Any) -> Any:
        """A tree like the parameters, as optimizers take it: `layers` are those whose leading axis counts layers."""
        if self.is_built_in:
            return tree
        found: dict[str, list[Any]] = {"layers": [], "others": []}
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            found["layers" if self.is_stacked(path_name(path)) else "others"].append(x)
        return found

    def from_optimizer(self, found: Any, like: Any) -> Any:
        """The inverse of `for_optimizer`."""
        if self.is_built_in:
            return found
        layers, others = iter(found["layers"]), iter(found["others"])
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
        leaves = [next(layers if self.is_stacked(path) else others) for path in paths]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the model for which norms are shown, in the order of the parameters."""
        if isinstance(self.task, LanguageModel) and self.task.parts is not None:
            return self.task.parts
        return tuple(dict.fromkeys(map(self.part_of, self._paths)))

    @functools.cached_property
    def part_of(self) -> Callable[[str], str]:
        """Path of a parameter, each layer of a stacked one by itself -> its part."""
        own = self.task.part_of
        if own is not None:
            return own
        if not any("/" in path for path in self._paths):  # plain weights, without layers
            return lambda path: _WHOLE
        # Linen's parameters may be inside {"params": …}: what all have in common tells nothing.
        split = [path.split("/") for path in self._paths]
        common = next(k for k in range(len(split[0])) if len({tuple(names[: k + 1]) for names in split}) > 1)
        if len({names[common] for names in split}) > _MOST_PARTS:
            return lambda path: _WHOLE
        return lambda path: path.split("/")[common]

    @functools.cached_property
    def _paths(self) -> list[str]:
        norms = jax.eval_shape(lambda params: leaf_sq_norms(params, self.is_stacked), self.shapes[0])
        layers = {path: [f"/{k}" for k in range(x.shape[0])] if x.ndim else [""] for path, x in norms.items()}
        return [path + layer for path, ends in layers.items() for layer in ends]

    @functools.cached_property
    def model(self) -> TaskModel:
        """What records hold of the task."""
        num_params = self.task.num_params or self.num_weights
        return TaskModel(self.name, num_params, self.task.unit, self.task.units_per_example).known_by(self)


def trainable(model: Model | TaskModel | Task | Trainable) -> Trainable:
    """The one `Trainable` of a model or task.

    Raises:
      UserError: see `TaskModel.trainable` and `Trainable`.
    """
    if isinstance(model, Trainable):
        return model
    if isinstance(model, TaskModel):
        return model.trainable
    if isinstance(model, Model):
        return _built_in(model)
    if "_trainable" not in model.__dict__:
        object.__setattr__(model, "_trainable", Trainable(model))
    return model.__dict__["_trainable"]


def record_of(model: Any) -> Any:
    """What a run's record holds of its model; a `Task` becomes its `TaskModel`, or the built-in model's config."""
    if not isinstance(model, Task):
        return model
    if isinstance(model, LanguageModel) and isinstance(model.model, Model):
        return model.model
    return trainable(model).model


@functools.cache
def _built_in(config: Model) -> Trainable:
    return Trainable(LanguageModel(config))


def _names(task: str, what: str, function: Callable, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a function's arguments."""
    parameters = inspect.signature(function).parameters
    needed = tuple(name for name, p in parameters.items() if p.default is p.empty or name in known)
    if not {"params", "batch"} <= set(needed) or not set(needed) <= set(known):
        raise UserError(
            f"{what} of task {task} takes ({', '.join(parameters)}): name its arguments params and batch"
            + "".join(f", or also {name}" for name in known[2:])
        )
    return needed


def _read_params(folder: Path, shapes: Any, name: str) -> Any:
    """The parameters that Orbax wrote to a folder."""
    import orbax.checkpoint as ocp  # takes seconds

    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(folder.expanduser().resolve(), shapes)
    except Exception as error:  # Orbax may raise anything
        what = " ".join(str(error).split())
        raise UserError(
            f"can't read start = {folder} of task {name} ({what[:200]}): give a folder that Orbax's "
            "StandardCheckpointer wrote, with parameters of the shapes of init's"
        ) from None
