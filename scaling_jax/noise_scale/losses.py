"""What a loss must be, so that the gradient of a batch is the mean of the gradients of its parts.

A loss is read at trace time, from its jaxpr: which devices it reduces over, whether it divides by a sum over the batch,
and which parameters it gathers.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from scaling_jax.noise_scale.accumulate import Split, names
from scaling_jax.noise_scale.norms import GATHER, SCATTER, Gathering

_BATCH, _POOLED = "batch", "pooled"  # what a value depends on: the batch; a single number made from the whole batch
_LIBRARIES = tuple(str(Path(file).parent) for file in (__file__, jax.__file__))
# These name a mapped axis, and communicate nothing.
_LOCAL = ("axis_index", "pvary", "pcast", "pbroadcast", "vary_unreduced_cast", "reduced_vary_cast")


def fixed_denominator(sum_loss_fn: Callable, weight_per_example: float, has_aux: bool = False) -> Callable:
    """A mean loss made from a weighted sum: the sum divided by (examples · weight_per_example).

    With `value_and_grad(weighted=True)` the batch's own sum of weights is the denominator instead.

    Args:
      sum_loss_fn: `(params, batch, *extra) -> sum over examples and tokens of weight · loss`, or `(sum, aux)`.
      weight_per_example: a constant. With the expected weight of an example, the result is a mean per unit of weight.
      has_aux: `sum_loss_fn` returns `(sum, aux)`.

    Returns:
      A `loss_fn` for `value_and_grad`.
    """
    if not weight_per_example > 0:
        raise ValueError(f"weight_per_example={weight_per_example} must be positive")

    def loss_fn(params, batch, *extra):
        denominator = weight_per_example * jax.tree.leaves(batch)[0].shape[0]
        if has_aux:
            total, aux = sum_loss_fn(params, batch, *extra)
            return total / denominator, aux
        return sum_loss_fn(params, batch, *extra) / denominator

    return loss_fn


def check_mean_loss(
    loss_fn: Callable,
    params,
    batch,
    *extra,
    num_parts: int = 2,
    rtol: float = 1e-5,
    weighted: bool = False,
    has_aux: bool = False,
) -> None:
    """Check that loss and gradient of a batch are the means of those of its parts. Call it once before training.

    Pass a batch with the weights and padding that occur in training.

    Args:
      loss_fn, weighted, has_aux: as for `value_and_grad`. With `weighted`, sum and weight of the batch must be the sums
        of those of its parts.
      num_parts: equal parts of the batch, along the first axis.
      rtol: relative tolerance of the loss; gradients may differ by a hundred times that. Take 1e-2 for bfloat16.

    Raises:
      ValueError: if it isn't the mean: the loss divides by the batch's own weights, or sums over examples.
    """

    sizes = {len(x) if np.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or min(sizes) == 0:
        raise ValueError(
            f"the leaves of the batch have {', '.join(map(str, sorted(sizes)))} examples: give each a leading axis "
            "with one entry for each example"
        )
    if num_parts < 2:
        raise ValueError(f"num_parts={num_parts} must be at least 2")
    if min(sizes) % num_parts:
        most = min(sizes) // num_parts * num_parts
        fewer = f"leave out {min(sizes) - most}, or " if most else ""
        divisor = next((n for n in range(2, min(sizes) + 1) if min(sizes) % n == 0), None)
        instead = "give a larger batch" if divisor is None else f"{fewer}pass num_parts={divisor}"
        count = min(sizes)
        raise ValueError(f"the batch has {count} examples, which don't make {num_parts} equal parts: {instead}")
    length = min(sizes) // num_parts

    def of(part):
        def loss(params):
            found = loss_fn(params, part, *extra)
            found = found[0] if has_aux else found
            return (found[0] if weighted else found), found

        grads, found = jax.grad(loss, has_aux=True)(params)
        return np.asarray(found, np.float64), [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]

    whole, whole_grads = of(batch)
    starts = range(0, length * num_parts, length)
    values, grads = zip(*(of(jax.tree.map(lambda x, i=i: x[i : i + length], batch)) for i in starts), strict=True)
    parts, scale = np.array(values), 1 if weighted else num_parts
    together = parts.sum(0) / scale
    # Losses may agree by chance, as at a head of zeros, where every token has the same loss.
    off = sum(np.sum((sum(each) / scale - g) ** 2) for g, *each in zip(whole_grads, *grads, strict=True))
    size = max(sum(np.sum(g**2) for g in each) for each in grads) / scale**2
    agree = np.abs(together - whole) <= rtol * np.maximum(np.abs(whole), np.abs(parts).max(0))
    if not (np.all(agree) and off <= (100 * rtol) ** 2 * size):
        said, name = [np.array2string(x, precision=6) for x in (whole, together)], "sum" if weighted else "mean"
        raise ValueError(
            f"the loss of the batch is {said[0]}, the {name} of its {num_parts} parts' losses is {said[1]}, and the "
            f"gradients differ by {np.sqrt(off / max(size, 1e-300)):.2g} of their size: "
            + (
                "return the sums over the examples of weight times loss and of the weights"
                if weighted
                else "it isn't a mean over examples. Return (sum, weight) and pass weighted=True, or divide by a fixed "
                "denominator (noise_scale.fixed_denominator)"
            )
        )


def examine(loss_of: Callable, split: Split, weighted: bool = False) -> dict[str, Gathering]:
    """Reads the loss: {path of a parameter: how `taps.all_gather` gathers it}.

    Args:
      loss_of: `(params, microbatch) -> loss`, without aux.
      weighted: the loss is a sum, so it may do with the batch what it likes.

    Raises:
      ValueError: if the loss has a collective along the split's axes; if it divides by a sum over the batch; if a
        parameter differs between devices and isn't gathered, or is gathered twice.
    """
    microbatch = jax.tree.map(lambda x: x[0], split.batch_MxB)
    jaxpr = jax.make_jaxpr(loss_of)(split.params, microbatch).jaxpr
    paths = names(split.params)
    reader = _Reader(frozenset(split.axes), paths, {})
    is_key = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(microbatch)]
    batch = [frozenset([] if key else [_BATCH]) for key in is_key]
    (of_loss, *_) = reader.read(jaxpr, [frozenset([k]) for k in range(len(paths))] + batch)
    # The backward pass of custom_vjp and custom_jvp may be anything.
    if split.axes and any(eqn.primitive.name.startswith("custom_") for eqn in _equations(jaxpr)):
        for eqn in _equations(jax.make_jaxpr(jax.grad(loss_of))(split.params, microbatch).jaxpr):
            _refuse_collective(eqn, reader.axes)
    used = {paths[tag.number if isinstance(tag, _Slice) else tag] for tag in of_loss if isinstance(tag, (int, _Slice))}
    if direct := sorted(used & set(reader.gathered)):
        raise ValueError(f"loss_fn also uses the shard of {direct[0]!r} itself: use what taps.all_gather gave instead")
    divisions = [tag for tag in of_loss if isinstance(tag, _Division)]
    if divisions and not weighted:
        raise ValueError(
            f"loss_fn divides by a number that depends on the whole batch{divisions[0].where}, so it isn't a mean over "
            "examples: return (sum, weight) and pass weighted=True, or divide by a constant (fixed_denominator)"
        )
    for name, own in zip(paths, split.own_params, strict=True):
        if missing := own - set(reader.gathered[name].axes if name in reader.gathered else ()):
            raise ValueError(
                f"parameter {name!r} differs between the devices along {sorted(missing)}: gather its shards in loss_fn "
                "by noise_scale.taps.all_gather, or pass the whole parameter to every device"
            )
    return reader.gathered


def pair(value, what: str):
    """The two parts of what a loss returned; `what` says what it should be."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{what}, not {type(value).__name__}")
    return value


def scalar(value) -> jax.Array:
    """A loss or a weight as a floating-point number."""
    if getattr(value, "shape", () if isinstance(value, (int, float)) else None) != ():
        raise ValueError(
            f"loss_fn must return a number, not {jax.tree.map(jnp.shape, value)}; or set has_aux or weighted"
        )
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(jnp.float32)


class _Division(NamedTuple):
    where: str


class _Slice(NamedTuple):
    """In a loop over the leading axis of a parameter."""

    number: int


class _Gathered(NamedTuple):
    name: str


_OF_PARAMETERS = (int, _Slice, _Gathered)


class _Reader(NamedTuple):
    """Follows through a jaxpr what each value depends on: parameters, by number, and the batch."""

    axes: frozenset[str]
    paths: list[str]
    gathered: dict[str, Gathering]  # filled as gathers are found

    def read(self, jaxpr, inputs, of_one_example=False) -> list[frozenset]:
        """What the outputs depend on. `of_one_example`: in a loop over examples, where no number is of the batch."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def tags(value):
            return frozenset() if isinstance(value, Literal) else known.get(value, frozenset())

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [tags(value) for value in eqn.invars], of_one_example)
            for value, found in zip(eqn.outvars, outputs, strict=True):
                known[value] = _of_value(value.aval, found, of_one_example)
        return [tags(value) for value in jaxpr.outvars]

    def _equation(self, eqn, inputs, of_one_example) -> list[frozenset]:
        kind, params, all_inputs = eqn.primitive.name, eqn.params, frozenset().union(*inputs)
        if params.get("name") == GATHER:
            return [frozenset([self._gather(eqn, inputs[0])])]
        _refuse_collective(eqn, self.axes)
        if kind == "scan":
            body = _open(params["jaxpr"])
            # Of what goes in, xs have one dimension more than the body sees; of what comes out, the carry has not.
            num_xs = _differ(eqn.invars, body.invars)
            num_carry = len(eqn.outvars) - _differ(eqn.outvars, body.outvars)
            return self._loop(body, inputs, len(inputs) - num_xs - num_carry, num_carry, of_one_example)
        if kind == "while":
            return self._while(params, inputs, of_one_example)
        if kind == "cond":
            branches = [self.read(_open(branch), inputs[1:], of_one_example) for branch in params["branches"]]
            return [inputs[0].union(*tags) for tags in zip(*branches, strict=True)]
        for inner in _inner(params):
            if len(inner.invars) == len(inputs) and len(inner.outvars) == len(eqn.outvars):
                return self.read(inner, inputs, of_one_example)
            self.read(inner, [frozenset()] * len(inner.invars), True)
        if _divides(kind, params, inputs) and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
            all_inputs = all_inputs | {_Division(_where(eqn))}
        return [all_inputs] * len(eqn.outvars)

    def _gather(self, eqn, inputs) -> _Gathered:
        if len(inputs) != 1 or not all(isinstance(tag, (int, _Slice)) for tag in inputs):
            raise ValueError(f"taps.all_gather{_where(eqn)} gathers what isn't one parameter: use jax.lax.all_gather")
        (tag,) = inputs
        name = self.paths[tag.number if isinstance(tag, _Slice) else tag]
        if name in self.gathered:
            raise ValueError(f"loss_fn gathers parameter {name!r} twice: gather it once and use the result twice")
        along = [_axes_of(e.params) for e in _open(eqn.params["jaxpr"]).eqns if e.primitive.name not in _LOCAL]
        self.gathered[name] = Gathering(tuple(sorted(frozenset().union(*along))), isinstance(tag, _Slice))
        return _Gathered(name)

    def _loop(self, body, inputs, num_consts, num_carry, of_one_example):
        consts, carry, xs = inputs[:num_consts], inputs[num_consts:][:num_carry], inputs[num_consts + num_carry :]
        of_one_example = of_one_example or any(_BATCH in x for x in xs)
        xs = [frozenset(_Slice(tag) if isinstance(tag, int) else tag for tag in x) for x in xs]
        before = dict(self.gathered)
        while True:
            self.gathered.clear()
            self.gathered.update(before)
            outputs = self.read(body, [*consts, *carry, *xs], of_one_example)
            grown = [old | new for old, new in zip(carry, outputs, strict=False)]
            if grown == list(carry):
                return [*grown, *outputs[num_carry:]]
            carry = grown

    def _while(self, params, inputs, of_one_example):
        for_cond, for_body = params["cond_nconsts"], params["body_nconsts"]
        carry = inputs[for_cond + for_body :]
        self.read(_open(params["cond_jaxpr"]), [*inputs[:for_cond], *carry], of_one_example)
        consts = inputs[for_cond:][:for_body]
        return self._loop(_open(params["body_jaxpr"]), [*consts, *carry], for_body, len(carry), of_one_example)


def _equations(jaxpr) -> Iterator[Any]:
    """All equations, also inner ones, but for those of `taps.all_gather`."""
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") not in (GATHER, SCATTER):
            yield eqn
            for inner in _inner(eqn.params):
                yield from _equations(inner)


def _refuse_collective(eqn, axes: frozenset[str]) -> None:
    if eqn.primitive.name not in _LOCAL and (along := axes & _axes_of(eqn.params)):
        raise ValueError(
            f"loss_fn has a collective of its own along {sorted(along)}: {eqn.primitive.name}{_where(eqn)}. Return the "
            "mean over the device's own examples; value_and_grad averages over the devices, and "
            "noise_scale.taps.all_gather gathers parameters"
        )


def _of_value(aval, tags, of_one_example) -> frozenset:
    """What a value depends on, from what it is computed from."""
    if getattr(aval, "dtype", None) == np.bool_:  # no gradient flows back through a comparison
        tags = frozenset(tag for tag in tags if not isinstance(tag, _OF_PARAMETERS))
    if any(isinstance(tag, _OF_PARAMETERS) for tag in tags):
        return tags - {_POOLED}
    single = not of_one_example and getattr(aval, "shape", None) == ()
    return tags | {_POOLED} if single and _BATCH in tags else tags


def _divides(kind, params, inputs) -> bool:
    """True if an operation divides by a number made from the whole batch."""
    if kind in ("rsqrt", "pow") or (kind == "integer_pow" and params["y"] < 0):
        return _POOLED in inputs[0]
    return kind == "div" and _POOLED in inputs[1]


def _open(jaxpr) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _differ(outside, inside) -> int:
    return sum(a.aval.shape != b.aval.shape for a, b in zip(outside, inside, strict=True))


def _inner(params):
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(_open(each), "eqns"):
                yield _open(each)


def _axes_of(params) -> frozenset[str]:
    named = (params.get("axes", ()), params.get("axis_name", ()))
    return frozenset(a for n in named for a in (n if isinstance(n, (tuple, list)) else (n,)) if isinstance(a, str))


def _where(eqn) -> str:
    """The user's line, as " (loss.py:12)"."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith((*_LIBRARIES, "<")):
            return f" ({frame.file_name.rpartition('/')[2]}:{frame.line_num})"
    return ""
