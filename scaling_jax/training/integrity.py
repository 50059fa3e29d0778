"""Tells whole records and states from damaged ones: checksums, and what the records of a finished run must say."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.io.files import open_plain
from scaling_jax.training.metrics import MetricsLine

if TYPE_CHECKING:
    from scaling_jax.training.records import RunResult


class LinesHash:
    """The SHA-256 of metrics.jsonl after each of its lines, as this version writes them."""

    def __init__(self, lines: Sequence[MetricsLine] = ()):
        self._sha256 = hashlib.sha256()
        self.at_step: dict[int, str] = {}
        for line in lines:
            self.add(line)

    def add(self, line: MetricsLine) -> None:
        self._sha256.update(json.dumps(line.json()).encode() + b"\n")
        self.at_step[line.step] = self.digest

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()


def records_checksum(config: str, metrics: str, result: Mapping[str, Any]) -> str:
    """The checksum in result.json.

    Args:
      config, metrics: SHA-256 of config.json and of metrics.jsonl.
      result: the other values of result.json.
    """
    values = {name: value for name, value in result.items() if name != "checksum"}
    return hashlib.sha256(json.dumps([config, metrics, values], sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file; that of nothing if there is no file."""
    if not path.exists():
        return hashlib.sha256().hexdigest()
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def is_finite(line: MetricsLine) -> bool:
    """True unless a loss of the line isn't finite, which ends a run."""
    return bool(np.isfinite(line.train_loss).all()) and not (line.evaluated and not math.isfinite(line.test_loss))


def disagreement(last: MetricsLine | None, not_finite: int | None, result: "RunResult") -> str | None:
    """What the lines of a finished run say against its result; None if they agree. Needs no checksum.

    Args:
      last: line; None if there is none.
      not_finite: last step of the first line that isn't finite; None if all are.
    """
    if (end := last.step if last is not None else 0) != result.steps:
        return f"ends at step {end:,} but the run ended at step {result.steps:,}"
    if last is None:
        return "has no line"
    if last.tokens != result.tokens:
        return f"ends at {last.tokens:,} tokens but the run ended at {result.tokens:,}"
    final = last.test_loss if math.isfinite(last.test_loss) else None
    if final != result.test_loss:
        return f"ends with a test loss of {final} but the run ended with {result.test_loss}"
    if not_finite is not None and not (result.status == "diverged" and not_finite == last.step):
        return f"has a loss that isn't finite at step {not_finite:,}, but the run went on"
    return None


def state_checksum(state: Any) -> str:
    """A checksum of all bits of a pytree of arrays. It doesn't depend on how they lie on devices and in processes.

    Any single changed bit changes it; other damage goes unseen once in 2⁶⁴ times. The devices compute it, so that no
    array is copied to the host. With several processes, all must call this.
    """
    leaves = enumerate(jax.tree.leaves(jax.block_until_ready(state)), 1)
    # One at a time: several programs with collective operations at once can wait for each other on virtual devices.
    sums = [np.asarray(_weighted_sums(leaf, np.uint32(0x9E3779B9 * number % 2**32))) for number, leaf in leaves]
    totals = np.stack(sums).sum(axis=0, dtype=np.uint32)
    return "".join(f"{total:08x}" for total in totals.tolist())


@jax.jit
def _weighted_sums(leaf: jax.Array, start: jax.Array) -> jax.Array:
    """Two sums of an array's bits as 32-bit words, each times an odd weight of its place, modulo 2³²."""
    words = _words(leaf)
    place = jnp.full(words.shape, start)
    for axis in range(words.ndim):  # not reshape(-1), which would gather arrays that are split over devices
        strides = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(strides)
    place = _mixed(place)
    return jnp.stack([jnp.sum(words * (weight | 1), dtype=jnp.uint32) for weight in (place, _mixed(place + 1))])


def _words(leaf: jax.Array) -> jax.Array:
    """An array's bits, in unsigned numbers of 32 bits; shorter numbers get one each."""
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A hash of each 32-bit number (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
