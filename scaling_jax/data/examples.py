"""Examples of your own to train on: arrays, pytrees of arrays, or random-access sources, with a checksum."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from scaling_jax.io import UserError

WHOLE_BYTES = 1 << 30  # up to this size, the checksum is of all of a split's arrays
_SAMPLED = 256  # examples of a larger split, or of a source, that the checksum is of


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Data in two splits. Each is a pytree of arrays with the examples along the leading axis, or a source of examples.

    A source has `__len__` and `__getitem__`, as Grain's sources do; an item is one example, a pytree of arrays.
    """

    train: Any
    held_out: Any
    manifest: dict[str, Any]  # source, sha256, examples


def examples_of(train: Any, held_out: Any, name: str) -> Examples:
    """Data for a task, checked.

    Args:
      name: of the data, for reports.

    Raises:
      UserError: if a split has no examples, or its arrays differ in their number.
    """
    splits = {"train": train, "held_out": held_out}
    for split, rows in splits.items():
        if rows is None or not jax.tree.leaves(rows):
            raise UserError(f"{name} has no {split}: give arrays, a pytree of arrays, or a source with [] and len")
        if not is_source(rows):
            sizes = {np.shape(x)[0] if np.ndim(x) else 0 for x in jax.tree.leaves(rows)}
            if len(sizes) > 1:
                raise UserError(f"{split} of {name} has arrays of {sorted(sizes)} examples: give all the same number")
        if not count(rows):
            raise UserError(f"{split} of {name} has no examples")
    arrays = {split: rows if is_source(rows) else jax.tree.map(np.asarray, rows) for split, rows in splits.items()}
    digest = hashlib.sha256()
    for split, rows in arrays.items():
        digest.update(f"{split} {count(rows)}\n".encode())
        _add(digest, rows)
    examples = {split: count(rows) for split, rows in arrays.items()}
    manifest = {"source": name, "sha256": digest.hexdigest(), "examples": examples}
    return Examples(arrays["train"], arrays["held_out"], manifest)


def is_source(rows: Any) -> bool:
    """True for a source of examples, False for arrays."""
    is_leaf = jax.tree_util.all_leaves([rows])
    return is_leaf and not isinstance(rows, (np.ndarray, jax.Array)) and hasattr(rows, "__getitem__")


def count(rows: Any) -> int:
    """The number of examples."""
    return len(rows) if is_source(rows) else len(jax.tree.leaves(rows)[0])


def take(rows: Any, index_N: np.ndarray) -> Any:
    """The examples with these indices, stacked: [N, …]."""
    if not is_source(rows):
        return jax.tree.map(lambda x: x[index_N], rows)
    items = [rows[int(index)] for index in index_N]
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *items)


def num_bytes(rows: Any) -> float:
    """Size of all arrays; infinite for a source, which is read piece by piece."""
    return float("inf") if is_source(rows) else sum(x.nbytes for x in jax.tree.leaves(rows))


def _add(digest, rows: Any) -> None:
    """Adds names, types, shapes and values; of large arrays and sources, the values of some examples."""
    if num_bytes(rows) > WHOLE_BYTES:
        rows = take(rows, np.unique(np.linspace(0, count(rows) - 1, _SAMPLED).astype(int)))
    for path, x in jax.tree_util.tree_leaves_with_path(rows):
        digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))  # bfloat16 has no buffer of its own
