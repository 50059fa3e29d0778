"""Optimizers of other modules: a function by its import path, such as optax:lion, and whether it can train here."""

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scaling_jax.io import UserError

Factory = Callable[[Any], optax.GradientTransformation]  # of a learning rate

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_LIKE_A_MODEL = {"embedding": (512, 128), "layer_1": {"matrix": (128, 256), "scale": (128,)}}


def path_of(function: Callable) -> str:
    """The import path of a function, from the outermost package that has it: optax:lion.

    Raises:
      UserError: if it has none, such as a lambda: a record couldn't say which optimizer the run had.
    """
    module, name = getattr(function, "__module__", None) or "__main__", getattr(function, "__qualname__", "")
    packages = module.split(".")
    for outer in (".".join(packages[:k]) for k in range(1, len(packages) + 1)):
        if outer != "__main__" and getattr(sys.modules.get(outer), name, None) is function:
            return f"{outer}:{name}"
    raise UserError(
        f"optimizer = {name or function!r} has no import path, so no record could hold it: write it as a function of "
        "a module, and give its path, such as mymodule:make, or for one of Optax's optimizers, such as optax:lion, "
        "give its path and settings"
    )


def imported(path: str) -> Callable:
    """The function at an import path. Only training imports it, never reading a record.

    Raises:
      UserError: if there is none.
    """
    if not _PATH.fullmatch(path):
        raise UserError(f"optimizer.name = {path!r} is no import path: write module:function, such as optax:lion")
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # the module's own code runs
        raise UserError(
            f"optimizer.name = {path!r}: can't import {module} ({error}): install it, or put its folder on PYTHONPATH"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"optimizer.name = {path!r}: {module} has no {name}")
        found = getattr(found, part)
    return found


def check_factory(path: str, factory: Factory) -> Factory:
    """The factory, if it makes an optimizer of a traced learning rate that gives updates from gradients alone.

    Raises:
      UserError: if not. Says what failed.
    """
    rate, params = (
        jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), x, is_leaf=lambda x: isinstance(x, tuple))
        for x in ((), _LIKE_A_MODEL)
    )

    def update(learning_rate, params):
        state = factory(1.0).init(params)
        return factory(learning_rate).update(params, state, params)

    try:
        traced, (updates, _) = jax.make_jaxpr(update, return_shape=True)(rate, params)
        like: Any = jax.tree.structure(params)
        if jax.tree.structure(updates) != like:
            raise TypeError("its updates aren't like the parameters")
    except Exception as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"optimizer.name = {path!r} doesn't give an Optax optimizer for learning_rate and its settings ({what})"
        ) from error
    if not _depends(traced.jaxpr, len(jax.tree.leaves(updates))):
        raise UserError(
            f"optimizer.name = {path!r}: its updates don't depend on learning_rate, which a scan searches. Pass it on, "
            "and not through optax.inject_hyperparams, which keeps its first value"
        )
    return factory


def _depends(jaxpr, num_outputs: int) -> bool:
    """True if one of the first outputs depends on the first input."""
    reached = {jaxpr.invars[0]}
    for equation in jaxpr.eqns:
        if any(not hasattr(x, "val") and x in reached for x in equation.invars):  # constants have a `val`
            reached.update(equation.outvars)
    return any(not hasattr(x, "val") and x in reached for x in jaxpr.outvars[:num_outputs])
