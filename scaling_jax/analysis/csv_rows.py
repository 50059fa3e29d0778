"""Rows of named values as a CSV file."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.training.records import write_atomically


def write_rows(path: Path, kind: type[NamedTuple], rows: Sequence[NamedTuple]) -> None:
    """A line for each row of a kind of tuple under its fields' names; ten digits, and nothing for NaN."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(kind._fields)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_atomically(path, text.getvalue())


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.10g}"
