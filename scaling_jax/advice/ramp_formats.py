"""Batch ramps in the formats of other trainers, to and from stages.

What each can say, as its source has it in 2026:
  json: this package's list of stages; every ramp.
  megatron: Megatron-LM's --step-batch-size-schedule "0:768 250B:1536". Thresholds in tokens, rounded down to whole
    sequences; batches in sequences, growing or shrinking. It leaves the learning rate alone.
  megatron-rampup: its older --rampup-batch-size start increment samples, with --global-batch-size: equal increments,
    each for the same number of sequences. It leaves the learning rate alone, too.
  olmo-core: OLMo-core's BatchSizeSchedulerCallback. Each batch is a whole multiple or part of the one before, and the
    learning rate goes as the square root of the batch. It may change a few steps late, as it waits until the batches
    read so far divide by the growth.
  maxtext: MaxText's enable_rampup_batch_size. Sizes are for each device; equal increments, each for the whole steps
    that take its share of global_rampup_samples. It leaves the learning rate alone.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict
from scaling_jax.training.stages import Stage

_SUFFIXES = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
_SCHEDULE, _RAMPUP = "--step-batch-size-schedule", "--rampup-batch-size"
_MAXTEXT = ("per_device_batch_size_start", "per_device_batch_size_increment", "per_device_batch_size")


class _Setting(NamedTuple):
    """What a format may need besides the stages."""

    context: int | None  # tokens of a sequence
    devices: int | None


def ramp_as_text(
    stages: tuple[Stage, ...],
    format: str,
    *,
    context: int | None = None,
    devices: int | None = None,
    drop_rates: bool = False,
) -> str:
    """A ramp in a format, one of `FORMATS`.

    Args:
      stages: the first starts at 0 tokens.
      format: see this module.
      context: tokens of a sequence; for Megatron and MaxText, which count sequences.
      devices: for MaxText, which counts sequences per device.
      drop_rates: leave out learning rates that the format can't say.

    Raises:
      UserError: for what the format can't say. Names the stage.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose from {', '.join(FORMATS)}")
    if not drop_rates and format != "json":
        rule = math.sqrt if format == "olmo-core" else lambda growth: 1.0
        for k, stage in enumerate(stages):
            expected = rule(stage.batch_tokens / stages[0].batch_tokens)
            if not math.isclose(stage.learning_rate_factor, expected, rel_tol=1e-3):
                how = "makes the learning rate go as √batch" if format == "olmo-core" else "has no learning rates"
                _refuse(
                    format,
                    f"{how}, but stage {k + 1} has learning_rate_factor {stage.learning_rate_factor:.4g}: set it in "
                    "your trainer, and leave it out here with --drop-rates",
                )
    if len(stages) > 1 and format != "json":
        stages = tuple([stages[0], *(b for a, b in itertools.pairwise(stages) if a.batch_tokens != b.batch_tokens)])
    return FORMATS[format](stages, _Setting(context, devices))


def ramp_from_text(text: str, where: str, *, context: int | None = None) -> tuple[Stage, ...]:
    """The stages of a ramp in any of the formats, which is recognised.

    Args:
      text: of the file, or of the flags.
      where: its name, for errors.
      context: tokens of a sequence; for Megatron.

    Raises:
      UserError: if it is none of them, or has a mistake.
    """
    stripped = text.strip()
    if stripped.startswith(("[", "{")):
        try:
            found = json.loads(stripped)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"can't read a ramp from {where} ({error}): make one with scaling-jax advise --write-ramp"
            ) from None
        olmo_core = isinstance(found, dict) and {"batch_sizes", "schedule"} & set(found)
        return _from_olmo_core(found, where) if olmo_core else _from_list(found, where)
    if "per_device_batch_size_start" in stripped:
        return _from_maxtext(stripped, where, context)
    if _RAMPUP in stripped:
        return _from_rampup(stripped, where, context)
    if re.match(rf"({_SCHEDULE}[ =]*)?[\"']?\s*[\d.]+[KMBT]?:", stripped, re.IGNORECASE):
        return _from_schedule(stripped, where, context)
    raise UserError(
        f"{where} is no ramp: give a JSON list of stages, a schedule such as 0:768 250B:1536 of Megatron-LM, a "
        "batch_sizes and schedule of OLMo-core, or MaxText's settings; scaling-jax advise --write-ramp makes each"
    )


def _as_list(stages: tuple[Stage, ...], setting: _Setting) -> str:
    return json.dumps([dataclasses.asdict(stage) for stage in stages], indent=2) + "\n"


def _from_list(listed: Any, where: str) -> tuple[Stage, ...]:
    if not isinstance(listed, list) or not listed or not all(isinstance(stage, dict) for stage in listed):
        raise UserError(f'{where} isn\'t a list of stages, such as [{{"tokens": 0, "batch_tokens": 128}}]')
    return _starting_at_0(tuple(from_dict(Stage, s, where=f"{where}[{k}].") for k, s in enumerate(listed)), where)


def _as_schedule(stages: tuple[Stage, ...], setting: _Setting) -> str:
    sequences, starts = _in_sequences("megatron", stages, setting)
    context = setting.context or 1
    pairs = [f"{_number(start * context)}:{batch}" for start, batch in zip(starts, sequences, strict=True)]
    return f'{_SCHEDULE} "{" ".join(pairs)}"\n'


def _from_schedule(text: str, where: str, context: int | None) -> tuple[Stage, ...]:
    context = _needed_context("megatron", context)
    entries = text.replace(_SCHEDULE, " ").replace("=", " ").replace(",", " ").replace('"', " ").replace("'", " ")
    pairs = []
    for entry in entries.split():
        try:
            start, batch = map(_value, entry.split(":"))
        except ValueError:
            raise UserError(f"{where}: {entry!r} isn't TOKENS:SEQUENCES, such as 250B:1536") from None
        pairs.append((start // context, batch))
    pairs.sort()
    return _starting_at_0(tuple(Stage(start * context, batch * context) for start, batch in pairs), where)


def _as_rampup(stages: tuple[Stage, ...], setting: _Setting) -> str:
    sequences, starts = _in_sequences("megatron-rampup", stages, setting)
    increment = _increment("megatron-rampup", sequences)
    count = len(stages) - 1
    samples = min(start * count // k for k, start in enumerate(starts[1:], 1))
    for k, start in enumerate(starts[1:], 1):
        if -(-k * samples // count) != start:
            _refuse("megatron-rampup", f"gives each increment the same number of sequences; stage {k + 1} has another")
    return f"{_RAMPUP} {sequences[0]} {increment} {samples} --global-batch-size {sequences[-1]}\n"


def _from_rampup(text: str, where: str, context: int | None) -> tuple[Stage, ...]:
    context = _needed_context("megatron-rampup", context)
    found = re.search(rf"{_RAMPUP}[ =]+(\d+)\s+(\d+)\s+(\d+)", text)
    last = re.search(r"--global-batch-size[ =]+(\d+)", text)
    if not found or not last:
        raise UserError(f"{where}: give {_RAMPUP} START INCREMENT SAMPLES and --global-batch-size END, whole numbers")
    start, increment, samples = map(int, found.groups())
    end = int(last[1])
    if not 0 < start < end or increment < 1 or samples < 1 or (end - start) % increment:
        raise UserError(
            f"{where}: {_RAMPUP} {start} {increment} {samples} must rise to --global-batch-size {end} in whole "
            "increments, over at least one sequence"
        )
    count = (end - start) // increment
    stages = (Stage(-(-k * samples // count) * context, (start + k * increment) * context) for k in range(count + 1))
    return tuple(stages)


def _as_olmo_core(stages: tuple[Stage, ...], setting: _Setting) -> str:
    for k, (before, stage) in enumerate(itertools.pairwise(stages), 2):
        small, large = sorted((before.batch_tokens, stage.batch_tokens))
        if large % small:
            _refuse(
                "olmo-core",
                f"changes a batch by a whole factor; stage {k} goes from {before.batch_tokens:,} to "
                f"{stage.batch_tokens:,} tokens",
            )
    schedule = [{"value": stage.tokens, "unit": "tokens"} for stage in stages]
    return json.dumps({"batch_sizes": [s.batch_tokens for s in stages], "schedule": schedule}, indent=2) + "\n"


def _from_olmo_core(found: dict, where: str) -> tuple[Stage, ...]:
    batches, schedule = found.get("batch_sizes"), found.get("schedule")
    if not isinstance(batches, list) or not isinstance(schedule, list) or len(batches) != len(schedule) or not batches:
        raise UserError(f"{where}: give batch_sizes and schedule, two lists of equal length, as OLMo-core has them")
    stages: list[Stage] = []
    step = 0
    for batch, at in zip(batches, schedule, strict=True):
        unit, value = (at.get("unit"), at.get("value", -1)) if isinstance(at, dict) else (None, -1)
        if unit not in ("tokens", "steps") or not _is_count(value) or not _is_count(batch) or not batch:
            raise UserError(f'{where}: {at} isn\'t a time such as {{"value": 1000000, "unit": "tokens"}}, or steps')
        if unit == "steps" and stages:
            value, step = stages[-1].tokens + (value - step) * stages[-1].batch_tokens, value
        stages.append(Stage(value, batch, math.sqrt(batch / batches[0])))
    return _starting_at_0(tuple(stages), where)


def _as_maxtext(stages: tuple[Stage, ...], setting: _Setting) -> str:
    if setting.devices is None:
        raise UserError("--format maxtext counts sequences for each device: give --devices")
    sequences, starts = _in_sequences("maxtext", stages, setting)
    increment = _increment("maxtext", sequences)
    count = len(stages) - 1
    steps = [-(-(b - a) // size) for (a, b), size in zip(itertools.pairwise(starts), sequences, strict=False)]
    whole = all((b - a) % size == 0 for (a, b), size in zip(itertools.pairwise(starts), sequences, strict=False))
    samples = count * min(n * size for n, size in zip(steps, sequences, strict=False))  # the most that fits each stage
    if not whole or any(n != -(-samples // (count * size)) for n, size in zip(steps, sequences, strict=False)):
        _refuse("maxtext", "gives each increment the same number of sequences, in whole steps; these stages differ")
    lines = [f"# for {setting.devices} devices", "enable_rampup_batch_size: true"]
    values = (sequences[0], increment, sequences[-1])
    lines += [f"{name}: {value / setting.devices!r}" for name, value in zip(_MAXTEXT, values, strict=True)]
    lines += [f"global_rampup_samples: {samples}", f"max_target_length: {setting.context}"]
    return "\n".join(lines) + "\n"


def _from_maxtext(text: str, where: str, context: int | None) -> tuple[Stage, ...]:
    found = dict(re.findall(r"^\s*(\w+)\s*[:=]\s*([^\s#]+)", text, re.MULTILINE))
    devices = re.search(r"^#\s*for (\d+) devices", text, re.MULTILINE)
    if devices is None:
        raise UserError(f"{where}: MaxText counts sequences for each device: add a line `# for 8 devices`")
    names = (*_MAXTEXT, "global_rampup_samples")
    try:
        start, increment, end, samples = (float(found[name]) for name in names)
        length = int(found.get("max_target_length", context or 0))
    except (KeyError, ValueError):
        raise UserError(f"{where}: give numbers for {', '.join(names)} and max_target_length") from None
    if length < 1 or (context is not None and length != context):
        raise UserError(f"{where}: max_target_length is {length}, but the model's context is {context}: give the same")
    if not 0 < start < end < math.inf or not 0 < increment < math.inf or (end - start) % increment or not samples >= 1:
        raise UserError(f"{where}: {_MAXTEXT[2]} must be above {_MAXTEXT[0]} by whole increments, over some samples")
    first, rise, last = (int(int(devices[1]) * size) for size in (start, increment, end))
    if first < 1 or rise < 1:
        raise UserError(f"{where}: on {devices[1]} devices {_MAXTEXT[0]} or its increment is less than a sequence")
    share = samples / ((end - start) // increment)
    stages, tokens = [Stage(0, first * length)], 0
    for size in range(first, last, rise):
        tokens += math.ceil(share / size) * size * length
        stages.append(Stage(tokens, min(size + rise, last) * length))
    return tuple(stages)


FORMATS: dict[str, Callable[[tuple[Stage, ...], _Setting], str]] = {
    "json": _as_list,
    "megatron": _as_schedule,
    "megatron-rampup": _as_rampup,
    "olmo-core": _as_olmo_core,
    "maxtext": _as_maxtext,
}


def _in_sequences(format: str, stages: tuple[Stage, ...], setting: _Setting) -> tuple[list[int], list[int]]:
    """(batches, starts) of stages in sequences."""
    context = _needed_context(format, setting.context)
    for k, stage in enumerate(stages, 1):
        for what, value in (("a batch", stage.batch_tokens), ("a start at", stage.tokens)):
            if value % context:
                _refuse(format, f"counts sequences; stage {k} has {what} of {value:,} tokens, no multiple of {context}")
    return [s.batch_tokens // context for s in stages], [s.tokens // context for s in stages]


def _increment(format: str, sequences: list[int]) -> int:
    """The growth of the batch from stage to stage, in sequences."""
    steps = {b - a for a, b in itertools.pairwise(sequences)}
    if len(steps) != 1 or min(steps) < 1:
        _refuse(
            format, f"grows the batch by equal increments; these batches are {', '.join(map(str, sequences))} sequences"
        )
    return steps.pop()


def _needed_context(format: str, context: int | None) -> int:
    if context is None or context < 1:
        raise UserError(f"{format} counts sequences: give --context, the tokens of a sequence")
    return context


def _starting_at_0(stages: tuple[Stage, ...], where: str) -> tuple[Stage, ...]:
    if not stages or stages[0].tokens != 0:
        at = f", not at {stages[0].tokens:,}" if stages else ""
        raise UserError(f"the first stage of {where} must start at 0 tokens{at}")
    return stages


def _refuse(format: str, why: str) -> NoReturn:
    raise UserError(f"--format {format} can't say this ramp: it {why}")


def _number(value: int) -> str:
    """As short as it is exact: 250B, 1.5M."""
    for suffix, size in _SUFFIXES.items():
        if value >= size and value % (size // 1000) == 0 and int(float(said := f"{value / size:g}") * size) == value:
            return f"{said}{suffix}"
    return str(value)


def _value(said: str) -> int:
    suffix = said[-1:].upper()
    value = float(said[:-1]) * _SUFFIXES[suffix] if suffix in _SUFFIXES else float(said)
    if not 0 <= value < 2**63:
        raise ValueError(said)
    return int(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
