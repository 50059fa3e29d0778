"""The examples of a run: packed text, or the data of its task, checked against the run."""

import functools
from typing import Any

import jax

from scaling_jax.data import Corpus, Examples, examples_of, prepare
from scaling_jax.data.examples import count, num_bytes, take
from scaling_jax.io import UserError
from scaling_jax.tasks import LanguageModel, Model, Trainable, held_out_rows
from scaling_jax.tasks.evaluation import chosen
from scaling_jax.training.run import Run

Data = Corpus | Examples


def data_of(run: Run) -> Data:
    """The examples that a run trains on and is evaluated on. Packs text, unless it was packed before.

    Raises:
      UserError: see `data.prepare` and `data.examples_of`.
    """
    task = run.trainable
    if isinstance(task.task, LanguageModel):
        return prepare(run.text, run.model.context, run.tokenizer)
    return _examples(task)


def held_out(run: Run, data: Data) -> Any:
    """The held-out examples of every evaluation, up to `eval_tokens`: a random choice, the same every time."""
    if isinstance(data, Corpus):
        return held_out_rows(data.test_RxT1, run.eval_tokens)
    there = count(data.held_out)
    wanted = max(1, min(there, run.eval_tokens // run.model.context))
    if wanted == there and num_bytes(data.held_out) < float("inf"):
        return data.held_out
    return _taken(data, wanted)


def check_data(run: Run, data: Data) -> None:
    """Raises UserError if the data don't fit the model: of text its vocabulary, or the length of its rows."""
    if not isinstance(data, Corpus):
        return
    if isinstance(run.model, Model) and data.vocab_size > (size := run.model.vocab_size):
        raise UserError(
            f"the tokenizer has {data.vocab_size:,} tokens but the model's vocab_size is {size:,}: "
            "use a larger vocab_size"
        )
    if data.train_RxT1.shape[1] != run.model.context + 1:
        raise UserError(
            f"the corpus has rows of {data.train_RxT1.shape[1] - 1} tokens but the model's context is "
            f"{run.model.context}: prepare the text with the model's context"
        )
    task = run.trainable.task
    if isinstance(task, LanguageModel) and not isinstance(task.model, Model):
        tokens = jax.ShapeDtypeStruct((1, run.model.context), "int32")
        logits = jax.eval_shape(task.logits, run.trainable.shapes[0], tokens)
        if logits.shape[:2] != tokens.shape or logits.shape[2] < data.vocab_size:
            raise UserError(
                f"apply of {run.model.name} gives logits {logits.shape} for tokens {tokens.shape}: it must give "
                f"(1, {run.model.context}, V) with V of {data.vocab_size:,} or more, the tokenizer's vocabulary"
            )


def check_batch(batch_tokens: int, run: Run, data: Data) -> None:
    """Raises UserError if a batch is larger than the data: examples that come twice in it aren't independent."""
    there, unit = count(data.train) * run.model.context, run.model.unit
    if batch_tokens > there:
        what = "the text has" if isinstance(data, Corpus) else "there is to train on"
        raise UserError(f"batch_tokens = {batch_tokens:,} is more than {what}, {there:,} {unit}: use a smaller batch")


@functools.cache
def _examples(task: Trainable) -> Examples:
    return examples_of(task.task.train, task.task.held_out, task.task.data_name or f"the data of {task.name}")


@functools.lru_cache(maxsize=4)
def _taken(data: Examples, wanted: int) -> Any:
    return take(data.held_out, chosen(count(data.held_out), wanted))
