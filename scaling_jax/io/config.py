"""Frozen dataclasses to JSON and back, their hashes, and overrides such as `key=value`."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from scaling_jax.io import UserError
from scaling_jax.io.files import read_whole

C = TypeVar("C")


class Settings(dict[str, Any]):
    """Values of numbers and text with any keys, such as the arguments of a function elsewhere. Don't change it.

    Raises:
      UserError: if a value is neither number, text, true, false nor None, which no record could hold.
    """

    def __init__(self, *values, **more):
        super().__init__(*values, **more)
        for key, value in self.items():
            if not isinstance(key, str) or not isinstance(value, (bool, int, float, str, type(None))):
                raise UserError(f"settings: {key} = {_said(value)}: expected a number, text, true, false or None")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"settings: {key} = {value}: expected a finite number")

    def __hash__(self):  # type: ignore[override]
        return hash(tuple((key, self[key]) for key in sorted(self)))


_BEYOND = 2**63  # whole numbers from here on fit in no array
_LONGEST = 80  # characters of a value in a message
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_SIZE = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|[\d_]*\.?\d+)(?:[eE][+-]?\d+)?)"  # refuses 1,5, which may mean 1.5
    r"(?:(?:\^|\*\*)(?P<power>\d+))?(?P<unit>k|M|G|T|Ki|Mi|Gi)?"
)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON values; nested dataclasses become dicts and tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], values: dict[str, Any], where: str = "") -> C:
    """The inverse of `to_dict`. `where` is the key of `values` in an outer config, for messages.

    Raises:
      UserError: if a key is unknown or missing, or its value has the wrong type. Names the key and what is expected.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or cls.__name__} = {_said(values)}: expected an object of keys and values")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = _type_hints(cls)  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its keys are {', '.join(fields)}"
            raise UserError(f"unknown key {where + key!r} for {cls.__name__}: {hint}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"missing key {where + name!r} for {cls.__name__}")
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def read_config(cls: type[C], path: Path, remedy: str) -> C:
    """A config from a JSON file that this package wrote.

    Args:
      remedy: what the user can do if the file can't be read, for messages.

    Raises:
      UserError: if the file can't be read. Names the file, what is wrong and the remedy.
    """
    try:
        return from_dict(cls, unsealed(json.loads(read_whole(path))))
    except UserError as error:
        raise UserError(f"{path} is from another version, or damaged ({error}): {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read {path} ({error}): {remedy}") from None


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with their checksum, `sha256`."""
    return {**values, "sha256": _sha256(values)}


def unsealed(values: Any) -> Any:
    """The values without their checksum; older files have none.

    Raises:
      UserError: if they have another checksum.
    """
    if not isinstance(values, dict) or "sha256" not in values:
        return values
    rest = {key: value for key, value in values.items() if key != "sha256"}
    if values["sha256"] != _sha256(rest):
        raise UserError("its values don't agree with its sha256")
    return rest


def differing(config: Any) -> dict[str, Any]:
    """The values without a default, and those that differ from their default, as JSON values.

    So a new field doesn't change the result, if its default stands for the behaviour before.
    """
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING or value != default:
            values[field.name] = _differing(value)
    return values


def config_hash(config: Any) -> str:
    """A hash of `differing(config)`, twelve hex digits."""
    return hashlib.sha256(json.dumps(differing(config), sort_keys=True).encode()).hexdigest()[:12]


def with_overrides(config: C, overrides: Sequence[str]) -> C:
    """A copy of the config with some values replaced.

    Args:
      overrides: such as "max_tokens=2e6", "seeds=[0,1]", "optimizer.beta2=0.95", "subjects.0.learning_rates.peak=1e-2".
        Numbers may be sizes: see `size`. A config whose method `named(key, text)` returns a value takes
        that: "model=llama-4x256".

    Raises:
      UserError: if there is no such key, or the value doesn't fit. Names the key and the closest valid key, or the
        value.
    """
    values = to_dict(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as key=value")
        *parents, last = path.split(".")
        inner, before = values, config  # the value that changes, and what the config has there
        for key in parents:
            place = _place(inner, key, override)
            before = _at(before, place)
            if inner[place] is None or isinstance(before, Settings):
                inner[place] = _New(inner[place] or {})
            inner = inner[place]
        place, value = _place(inner, last, override), _parse(text)
        if isinstance(value, str) and hasattr(before, "named"):
            new = before.named(place, value)
            value = value if new is None else to_dict(new)
        inner[place] = value
    return from_dict(type(config), values)


def check_positive(name: str, value: float) -> None:
    """Raises UserError unless a value is positive and finite, and below 2^63 if it is a whole number."""
    if not 0 < value < math.inf:
        raise UserError(f"{name} = {value!r} must be positive and finite")
    if isinstance(value, int):
        check_at_most(name, value, 2**63 - 1)


def check_at_most(name: str, value: float, most: int) -> None:
    """Raises UserError if a value is larger than `most`."""
    if value > most:
        shown = f"{value:,}" if value < 10**30 else f"a number of {len(str(value))} digits"
        raise UserError(f"{name} = {shown} must be at most {most:,}")


def size(text: str) -> float:
    """The value of a number such as 4096, 1e6, 2^18, 2k (2,000), 64Ki (65,536), 1.5M or 10G.

    Raises:
      ValueError: if the text isn't such a number.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} isn't a number such as 4096, 1e6, 2^18, 2k or 64Ki")
    number = float(match["number"].replace("_", "").replace(",", ""))
    try:
        return number ** float(match["power"] or 1) * _UNITS[match["unit"] or ""]
    except OverflowError:
        raise ValueError(f"{text!r} is too large a number") from None


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class _New(dict):
    """A new value for an optional config that is None, or settings. It takes any key; `from_dict` checks them later."""

    def __missing__(self, key: str) -> None:
        return None


def _at(config: Any, place: str | int) -> Any:
    """The value in a config or a tuple; None if it isn't there."""
    if isinstance(config, tuple) and isinstance(place, int):
        return config[place]
    return getattr(config, str(place), None)


def _place(values: Any, key: str, override: str) -> Any:
    """`key` as a key of a dict or an index of a list, checked."""
    if isinstance(values, _New):
        return key
    if not isinstance(values, (dict, list)):
        raise UserError(f"--set {override}: the key before {key!r} holds a single value; remove {key!r}")
    known = list(values) if isinstance(values, dict) else [str(k) for k in range(len(values))]
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known) or 'nothing: it is empty'}"
        raise UserError(f"--set {override}: there is no {key!r}; {hint}")
    return key if isinstance(values, dict) else int(key)


class _Typed(str):
    """Text from an override. The type of the field decides whether it is text or a number."""


def _parse(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return _typed(json.loads(text))
    if text.startswith("[") and text.endswith("]"):
        return [_parse(item.strip()) for item in text[1:-1].split(",") if item.strip()]
    return _Typed(text)


def _typed(value: Any) -> Any:
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _differing(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return differing(value)
    return [_differing(item) for item in value] if isinstance(value, tuple) else value


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)  # slow, and a folder of runs has thousands of each config


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where + ".")  # type: ignore[arg-type]
    if hint is Settings and isinstance(value, dict):
        return Settings({key: _setting(x) for key, x in value.items()})
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(f"{where} = {_said(value)}: choose from {', '.join(map(str, args))}")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        kinds = [kind for kind in args if kind is not type(None)]
        if isinstance(value, dict) and all(
            map(dataclasses.is_dataclass, kinds)
        ):  # the kind that has all of its keys, else the first, which says what is wrong
            kinds.sort(key=lambda kind: not set(value) <= {field.name for field in dataclasses.fields(kind)})
        return _convert(kinds[0], value, where)
    if isinstance(value, _Typed) and hint in (int, float):
        value = _number(value, where)
        value = int(value) if hint is int and value.is_integer() else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} = {value}: expected a finite number")
    if hint is int and isinstance(value, int) and abs(value) >= _BEYOND:
        raise UserError(f"{where} = {_said(value)}: expected a whole number below 2^63")
    if isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    raise UserError(f"{where} = {_said(value)}: expected {getattr(hint, '__name__', hint)}")


def _setting(value: Any) -> Any:
    """A value from an override as a number, if it is one."""
    if isinstance(value, _Typed):
        with contextlib.suppress(ValueError):
            return _typed(size(value))
        return str(value)
    return value


def _said(value: Any) -> str:
    """The value for a message of one line."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _number(text: str, where: str) -> float:
    try:
        return size(text)
    except ValueError as error:
        raise UserError(f"{where} = {text}: {error}") from None
