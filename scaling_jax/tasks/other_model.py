"""A model that another program trains: what this package must know of it."""

import dataclasses
import re

from scaling_jax.io import UserError
from scaling_jax.io.config import check_positive

_NAME = re.compile(r"[\w.+=-][\w.+= -]*")  # it becomes a part of folder names


@dataclasses.dataclass(frozen=True)
class OtherModel:
    """A model of another trainer. Wherever an experiment says tokens, it then means the model's `unit`."""

    name: str
    num_params: int  # N, without embeddings where that applies (Kaplan et al. 2020)
    unit: str = "examples"  # what batches count, in the plural: tokens, images, …

    def __post_init__(self):
        check_name(self.name)
        check_positive("num_params", self.num_params)
        check_unit(self.unit)

    @property
    def context(self) -> int:
        """Length of an example in the unit."""
        return 1


def check_name(name: str) -> None:
    """Raises UserError unless a model's name can be a part of folder names."""
    if not _NAME.fullmatch(name):
        raise UserError(f"model name {name!r}: use letters, digits and . + = - _ in it")


def check_unit(unit: str) -> None:
    """Raises UserError unless a unit is one word."""
    if not re.fullmatch(r"[^\W\d_]+", unit):
        raise UserError(f"unit = {unit!r}: give one word in the plural, such as images")
