"""Critical batch sizes from branches of one run (Merrill et al. 2025): branches.csv, if the results have one."""

import csv
from pathlib import Path
from typing import NamedTuple

from scaling_jax.errors import UserError


class Branch(NamedTuple):
    """B_crit at one checkpoint of a run, tokens."""

    model: str
    batch_tokens: int  # of the run that was branched
    seed: int
    tokens: float  # processed by the checkpoint
    loss: float  # nats per token
    b_crit: float  # inf where no branch fell behind
    low: float
    high: float


def read_branches(workdir: Path) -> list[Branch]:
    """Every row of `branches.csv`; none if there is no such file.

    Raises:
      UserError: naming the line that doesn't hold what it should.
    """
    path = workdir / "branches.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [_branch(row, f"{path} line {rows.line_num}") for row in rows]


def _branch(row: dict[str, str], where: str) -> Branch:
    try:
        return Branch(
            model=row["model"],
            batch_tokens=int(row["batch_tokens"]),
            seed=int(row["seed"]),
            tokens=float(row["tokens"]),
            loss=float(row["loss"]),
            b_crit=float(row["b_crit"]),
            low=float(row["low"]),
            high=float(row["high"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} isn't a branch measurement ({error}): measure the branches again") from None
