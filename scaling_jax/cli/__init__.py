"""The command line `scaling-jax …`. Each module here adds its commands to `app`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from scaling_jax.io.config import size

app = tyro.extras.SubcommandApp()


def _whole(words: Sequence[str]) -> int:
    value = size(words[0])
    if not value.is_integer():
        raise ValueError(f"{words[0]} isn't a whole number")
    return int(value)


Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE")]
Size = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=_whole,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


def joined(arguments: Sequence[str], flag: str = "--set") -> list[str]:
    """The arguments with all values of a repeated flag after a single flag, because tyro reads a flag only once."""
    kept: list[str] = []
    values: list[str] = []
    inside = False
    for argument in arguments:
        if argument == flag:
            inside = True
        elif argument.startswith(f"{flag}="):
            values.append(argument.removeprefix(f"{flag}="))
            inside = False
        else:
            inside = inside and not argument.startswith("-")
            (values if inside else kept).append(argument)
    return kept + ([flag, *values] if values or flag in arguments else [])
