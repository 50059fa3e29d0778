"""What all tables of users have in common: rows, numbers in cells, batches in tokens, and a fit beside the table.

Errors name the line and the column.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling_jax.io import UserError
from scaling_jax.io.files import read_whole, write_json

_FEWEST_TOKENS = 64  # if all batches are smaller, they are probably in sequences
_LARGEST_GAP = 64  # between neighbouring batch sizes; a larger ratio is probably a change of unit
_LARGEST_LOSS = 15.0  # nats per token; the loss of guessing among three million tokens


def lines_of(path: Path) -> list[str]:
    """The lines of a table. Raises UserError if it isn't a file in UTF-8."""
    try:
        return read_whole(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path} ({error}): give a CSV file in UTF-8") from error


def filled_rows(path: Path, header: Sequence[str], rows: Any) -> Iterator[tuple[int, list[str]]]:
    """(line, stripped cells) of the rows that aren't empty, of a `csv.reader` after its header.

    Raises:
      UserError: if a row hasn't a cell for each column, or all are empty.
    """
    empty = True
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise UserError(
                f"{path} line {rows.line_num}: {len(row)} cells under {len(header)} columns; give each column a cell"
            )
        empty = False
        yield rows.line_num, [cell.strip() for cell in row]
    if empty:
        raise UserError(f"{path} has no rows under its header: add at least one")


def number(where: str, cell: str) -> float:
    """The number in a cell; `where` is the cell's place, for messages. Raises UserError if it is none."""
    try:
        return float(cell.replace("_", ""))
    except ValueError:
        raise UserError(f"{where} is {cell!r}: it must be a number") from None


def check_positive(where: str, cell: str, value: float, hint: str = "") -> None:
    """Raises UserError unless the number in a cell is positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{where} is {cell}: it must be positive and finite{hint}")


def check_loss(where: str, cell: str, value: float, hint: str = "") -> None:
    """Raises UserError if a loss can't be in nats per token."""
    if value > _LARGEST_LOSS:
        raise UserError(
            f"{where} is {cell}, too large for nats per token: if it is a perplexity, give its natural logarithm{hint}"
        )


def check_batches_in_tokens(path: Path, model: str, line_of: dict[float, int]) -> None:
    """Raises UserError if a model's batches are probably in sequences.

    Args:
      line_of: {batch size: the first line that has it}.
    """
    batches = sorted(line_of)
    if batches[-1] < _FEWEST_TOKENS:
        raise UserError(
            f"{path} line {line_of[batches[-1]]}, column batch_tokens: the largest batch of model {model} is "
            f"{batches[-1]:g} tokens; if these are sequences, multiply by the tokens per sequence"
        )
    for smaller, larger in itertools.pairwise(batches):
        if larger >= _LARGEST_GAP * smaller:
            raise UserError(
                f"{path} line {line_of[smaller]}, column batch_tokens: model {model} has batches of {smaller:g} and "
                f"then of {larger:g} tokens; if the smaller are sequences, multiply them by the tokens per sequence"
            )


def write_beside(table: Path, values: dict[str, Any]) -> Path:
    """Writes a fit to <table>.fit.json, and returns its path. Raises UserError if the file can't be written."""
    path = table.with_suffix(".fit.json")
    try:
        write_json(path, values | {"measurements": table.name})
    except OSError as error:
        raise UserError(
            f"can't write {path} ({error.strerror}): copy the table to a folder that you can write to"
        ) from error
    return path
