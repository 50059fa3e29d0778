"""The run for `train`, from a file, flags and overrides. Flags replace values of the file; overrides replace both."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_jax.data.sources import find_documents
from scaling_jax.data.tokenizers import bpe_vocabulary, most_ids
from scaling_jax.io import UserError
from scaling_jax.io.config import check_positive, with_overrides
from scaling_jax.scanning.records import load_run
from scaling_jax.tasks import TaskModel, model_config
from scaling_jax.training import Recipe, Run
from scaling_jax.training.examples import check_data, data_of
from scaling_jax.training.stages import read_stages

_EITHER = (("max_tokens", "max_steps"), ("warmup_tokens", "warmup_steps"))


def planned_run(
    flags: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    run_file: Path | None = None,
    name: str | None = None,
    ramp: Path | None = None,
    model: str | None = None,
    context: int | None = None,
) -> Run:
    """The run to train.

    Args:
      flags: values of `Run` from the command line.
      overrides: `key=value` for any value of the run.
      run_file: a file with a run, whose values flags and overrides change; see `load_run`. Without a file, they must
        give the batch size, the learning rate and the end of the run.
      name: the run to take, if the file has several.
      ramp: a file with stages; see `read_stages`.
      model, context: size of the model, and its context.

    Raises:
      UserError: if a value is missing or doesn't fit. Names it.
    """
    given = dict(flags)
    factor = 1.0
    if ramp is not None:
        if "batch_tokens" in given:
            raise UserError(f"give --batch-tokens or --ramp {ramp}, not both")
        first, *later = read_stages(ramp)
        factor = first.learning_rate_factor
        check_positive(f"learning_rate_factor of the first stage of {ramp}", factor)
        later = [dataclasses.replace(s, learning_rate_factor=s.learning_rate_factor / factor) for s in later]
        given |= {"batch_tokens": first.batch_tokens, "ramp": tuple(later)}
    for end, other in (("max_tokens", "max_steps"), ("max_steps", "max_tokens")):
        if end in given:
            given.setdefault(other, None)
    if run_file is not None:
        run = load_run(run_file, name)
        run = dataclasses.replace(run, model=_changed(run, model, context), **given)
    else:
        run = _from_flags(given, overrides, model, context)
    loaded = run
    run = with_overrides(run, with_other_halves(run, overrides))
    if run.model == loaded.model:
        run = dataclasses.replace(run, model=loaded.model)  # which may know its task's code
    if run_file is None:
        run = with_vocabulary(run, most_ids(run.tokenizer), overrides)
    return run if factor == 1.0 else dataclasses.replace(run, learning_rate=run.learning_rate * factor)


def check_text(run: Run) -> None:
    """Refuses a text whose files aren't there, or a vocabulary that is too small, without reading the text.

    Raises:
      UserError: says which. A data set of TFDS, and how many ids a trained BPE has, are known only once it is prepared.
    """
    if isinstance(run.model, TaskModel):
        check_data(run, data_of(run))
        return
    if not run.text.startswith("tfds:"):
        find_documents(run.text)
    ids, size = most_ids(run.tokenizer), run.transformer.vocab_size
    if bpe_vocabulary(run.tokenizer) is None and ids > size:
        raise UserError(
            f"the tokenizer {run.tokenizer} has {ids:,} tokens but the model's vocab_size is {size:,}: "
            "use a larger vocab_size"
        )


def with_vocabulary(run: Run, vocab_size: int, overrides: Sequence[str]) -> Run:
    """The run with a model of this vocabulary size, unless an override sets another size."""
    if any(override.startswith("model.vocab_size=") for override in overrides):
        return run
    return dataclasses.replace(run, model=dataclasses.replace(run.transformer, vocab_size=vocab_size))


def with_other_halves(config: Recipe, overrides: Sequence[str]) -> list[str]:
    """The overrides, plus `null` for each value that excludes a value that is set, such as max_steps for max_tokens."""
    keys = {override.partition("=")[0] for override in overrides}
    both = [pair for a, b in _EITHER for pair in ((a, b), (b, a)) if hasattr(config, b)]
    return [*overrides, *(f"{b}=null" for a, b in both if a in keys and b not in keys)]


def _changed(run: Run, model: str | None, context: int | None):
    if model is None and context is None:
        return run.model
    size = run.transformer if model is None else model_config(model, vocab_size=run.transformer.vocab_size)
    return dataclasses.replace(size, context=run.transformer.context if context is None else context)


def _from_flags(given: dict[str, Any], overrides: Sequence[str], model: str | None, context: int | None) -> Run:
    said = given.keys() | {override.partition("=")[0] for override in overrides}
    for keys, flag in (
        (("batch_tokens",), "--batch-tokens or --ramp"),
        (("learning_rate",), "--learning-rate"),
        (("max_tokens", "max_steps"), "--max-tokens or --max-steps"),
    ):
        if not said.intersection(keys):
            raise UserError(f"give {flag}, or a file that defines RUN = Run(…)")
    size = model_config(model or "2x64", context=64 if context is None else context)
    # Overrides replace these values later.
    values: dict[str, Any] = {"batch_tokens": 2 * size.context, "learning_rate": 1.0}
    if not given.keys() & {"max_tokens", "max_steps"}:
        values["max_steps"] = 1
    return Run(**(values | {"model": size} | given))
